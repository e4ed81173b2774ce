"""Samples in blocks, each a function of (seed, split, block) alone: the result does not depend on how many processes make them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

_PATIENCE = 0.2  # seconds between looks at whether the processes are to end


def generate(make: Callable[[np.random.Generator, int], Any], samples: int, size: int, *, seed: int, split: int, workers: int) -> Iterator:
    """The blocks of a split, in order.

    Args:
        make: (rng, count) -> a block of ``count`` samples; picklable.
        samples: of the split.
        size: samples of a block; the last one may have fewer.
        seed, split: of the random numbers, >= 0: block b draws from ``default_rng([seed, split, b])``.
        workers: processes; 1: this one.
    """
    tasks = [(seed, split, number, min(size, samples - start)) for number, start in enumerate(range(0, samples, size))]
    one = partial(_one, make)
    if workers == 1:
        yield from map(one, tasks)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with _held_signals() as stopped, context.Pool(min(workers, len(tasks)), initializer=_leave_interrupts) as pool:
        blocks = pool.imap(one, tasks)
        for _ in tasks:
            while not stopped():
                try:
                    yield blocks.next(_PATIENCE)
                    break
                except multiprocessing.TimeoutError:
                    continue
            if stopped():
                raise KeyboardInterrupt  # unless what the signal is answered with raises something else


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal: a context that gives ``advance(samples made since)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, advance=done)


@contextmanager
def _held_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait until the processes have ended, and are then answered as before: an exception that a signal raises while a
    pool is made or ended can leave it waiting for ever. Gives a function that says whether one has come."""
    came: list[int] = []
    owner = os.getpid()

    def hold(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a process of the pool that has not begun
            os._exit(1)
        came.append(number)

    main = threading.current_thread() is threading.main_thread()
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if main and signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hold) for number in numbers}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _one(make: Callable, task: tuple[int, int, int, int]) -> Any:
    seed, split, number, count = task
    return make(np.random.default_rng([seed, split, number]), count)


def _leave_interrupts() -> None:
    """Ctrl-C and SIGTERM are the command's to answer: it ends its processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
