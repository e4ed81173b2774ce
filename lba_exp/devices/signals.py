"""Signals that ask a run to end (SIGTERM; under Slurm the one that says that the time is up): noted, and answered at the next step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.plugins.environments import SLURMEnvironment


class Requests:
    """Which signal asked this process to end.

    Attributes:
        received: the signal's number, of this process or, once they have agreed to end, of another one of the run; None: none so far.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._numbers: tuple[int, ...] = ()
        self._requeue: int | None = None

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Signals are noted inside, and mean what they meant before afterwards; outside of the main thread Python hears none.

        Under ``srun`` that is also the signal after which Lightning would requeue a job, SIGUSR1 (``sbatch --signal=SIGUSR1@90``).
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if SLURMEnvironment.detect():
            self._requeue = signal.SIGUSR1
        self._numbers = tuple(n for n in (signal.SIGTERM, self._requeue) if n is not None)
        before = {number: signal.getsignal(number) for number in self._numbers}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def listen(self) -> None:
        """Takes the signals over from Lightning, whose handler would use the network in the midst of anything, and wait for ever."""
        for number in self._numbers:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.received = self.received or number

    @property
    def name(self) -> str:
        """The signal's name, such as SIGTERM."""
        return signal.Signals(self.received).name

    def requeue(self) -> None:
        """Puts the Slurm job back into its queue where its signal asked for that; a job of an array by its own number."""
        if self.received is None or self.received != self._requeue:
            return
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
        if re.fullmatch(r"[0-9_]+", job):
            subprocess.run(["scontrol", "requeue", job], check=False)
