"""How long a model's forward pass takes, told by its first blocks: what would take too long is left before it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from lba_exp.callbacks.memory import LiveTensors

OVER = "over the limit"  # status of a cell whose pass was left
PACED_BLOCKS = 4  # that run in such a cell: two for the time, two for the memory


class Pace(NamedTuple):
    """``seconds`` of a pass, the second block's times the number of blocks (the first one's builds kernels), and whether it was left."""

    seconds: float
    left: bool


class _Left(Exception):
    """A forward pass was left between two blocks."""


@contextmanager
def _after_each(blocks: Sequence[nn.Module], see: Callable[[int], None]) -> Iterator[None]:
    """Calls ``see`` with the number of blocks that are done; what it raises ends the pass."""
    handles = [block.register_forward_hook(lambda *_, done=done: see(done)) for done, block in enumerate(blocks, 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pace(call: Callable[[], Any], blocks: Sequence[nn.Module], longest: float, device: torch.device) -> Pace:
    """Runs a forward pass, and leaves it after two blocks where the whole would take more than ``longest`` seconds.

    A model of one block is run to its end, and its time is all that it took.
    """
    ends = [time.perf_counter()]

    def see(done: int) -> None:
        if done > 2:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
        if done == 2 and len(blocks) * (ends[2] - ends[1]) > longest:
            raise _Left

    left = False
    with _after_each(blocks, see):
        try:
            call()
        except _Left:
            left = True
    seconds = len(blocks) * (ends[2] - ends[1]) if len(ends) > 2 else time.perf_counter() - ends[0]
    return Pace(seconds, left)


def two_blocks_bytes(call: Callable[[], Any], blocks: Sequence[nn.Module], device: torch.device) -> int | None:
    """Peak memory of a pass that is left after its second block: without gradients, blocks that are alike hold as much, one by one."""

    def see(done: int) -> None:
        if done == 2:
            raise _Left

    with LiveTensors(device) as memory, _after_each(blocks, see), suppress(_Left):
        call()
    return memory.bytes
