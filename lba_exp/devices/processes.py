"""The processes of one run."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from contextlib import suppress

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

PATIENCE = 10.0  # seconds for all of them together


def started_from_outside() -> bool:
    """Whether torchrun or Slurm's srun has started this process, and tells it which one of how many it is."""
    return TorchElasticEnvironment.detect() or SLURMEnvironment.detect()


def let_the_first_finish() -> None:
    """Lightning's watch over the processes it started would kill this one as soon as one of them has ended, in the midst of its record."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._run = lambda: True


def end_the_others(trainer: pl.Trainer) -> None:
    """Ends the processes that Lightning started for a run that has failed, where they do not end by themselves: they may wait for this one
    for ever."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    deadline = time.monotonic() + PATIENCE
    with suppress(subprocess.TimeoutExpired):
        for process in launcher.procs:
            process.wait(max(0.0, deadline - time.monotonic()))
    launcher.kill(signal.SIGKILL)
