"""Hydra finds the plugins of lba_exp here: the sweeper ``lba`` and the launcher ``local``."""
