"""Lightning callbacks: parity of the forms, cost, record, checkpoints."""
