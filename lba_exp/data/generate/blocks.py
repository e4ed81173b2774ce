"""Samples in blocks, each a function of (seed, split, block) alone: the result does not depend on how many processes make them."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np


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
    with context.Pool(min(workers, len(tasks)), initializer=_leave_interrupts) as pool:
        yield from pool.imap(one, tasks)


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


def _one(make: Callable, task: tuple[int, int, int, int]) -> Any:
    seed, split, number, count = task
    return make(np.random.default_rng([seed, split, number]), count)


def _leave_interrupts() -> None:
    """Ctrl-C and SIGTERM are the command's to answer: it ends its processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
