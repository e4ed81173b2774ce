"""The processes of one run on one machine."""

from __future__ import annotations

import signal
import threading

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


def let_the_first_finish() -> None:
    """Lightning's watch over the processes it started would kill this one as soon as one of them has ended, in the midst of its record."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._run = lambda: True


def end_the_others(trainer: pl.Trainer) -> None:
    """Ends the processes that Lightning started for a run that has failed: they may wait for this one for ever."""
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        trainer.strategy.launcher.kill(signal.SIGKILL)
