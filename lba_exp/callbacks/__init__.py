"""What runs beside training: parity between the forms, peak memory."""
