"""Data modules: where samples come from, how they become batches, and in which order a run sees them."""
