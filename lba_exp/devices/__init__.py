"""A run on many devices: weights that are sharded, processes that belong together."""
