"""Signals that end a command as Ctrl-C does: SIGTERM (``kill``, ``timeout``, Slurm) and SIGHUP (a terminal that is gone)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(KeyboardInterrupt):
    """A signal, by its number."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def number_of(stop: KeyboardInterrupt) -> int:
    """The signal that a command was stopped by; its exit code is 128 + n."""
    return getattr(stop, "number", signal.SIGINT)


def stopper(number: int) -> str:
    """Who sent the signal, in words."""
    return "the user" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise Stopped, but where they are ignored (nohup); outside of the main thread Python hears none."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
