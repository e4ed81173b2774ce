"""Encoders with heads, put together from the layers in ``lba_exp.nn``."""
