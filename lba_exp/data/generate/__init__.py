"""Data sets that are made by a rule rather than recorded: ListOps and Pathfinder of Long Range Arena (arXiv 2011.04006)."""
