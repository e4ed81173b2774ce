"""From measurements and run records to figures and tables."""
