"""How the kernels are launched: block and tile sizes by dtype and width, and how many segments a long sequence is cut into."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Plan:
    """Sizes of one launch, in tokens where nothing else is said. Results differ between plans by rounding alone.

    Attributes:
        block: of a block, between whose borders states are carried (0 without decay).
        rows: queries of a program that writes outputs; for the gradients of keys, queries at a time, a divisor of ``columns``.
        columns: keys at a time; for gradients, tokens of a program and keys at a time; a divisor of ``block``.
        warps, stages: of the kernels that write outputs or gradients.
        state_columns, state_warps, state_stages: the same of the kernel that sums states; state_columns is a divisor of ``block``.
        registers: the most that a thread of the former may take; None: what the compiler takes.
    """

    block: int
    rows: int
    columns: int
    warps: int
    stages: int
    state_columns: int
    state_warps: int
    state_stages: int
    registers: int | None = None


# by compute dtype and width: the plan of sequences of up to SHORT tokens, which are one block then, and that of longer ones
SHORT = 256
FORWARD = {
    ("half", 64): (Plan(256, 64, 32, 4, 3, 64, 4, 3), Plan(128, 64, 32, 4, 1, 128, 4, 2)),
    ("half", 128): (Plan(256, 64, 32, 8, 2, 64, 8, 2), Plan(128, 64, 64, 8, 2, 64, 8, 2)),
    ("full", 64): (Plan(32, 32, 32, 4, 1, 32, 4, 1),) * 2,
    ("full", 128): (Plan(32, 32, 32, 8, 1, 32, 8, 1),) * 2,
}
BACKWARD = {
    ("half", 64): (Plan(256, 32, 64, 4, 2, 64, 4, 1, 168), Plan(128, 32, 64, 4, 2, 128, 4, 2, 168)),
    ("half", 128): (Plan(128, 32, 64, 8, 1, 64, 8, 2),) * 2,
    ("full", 64): (Plan(32, 32, 32, 4, 1, 32, 4, 1),) * 2,
    ("full", 128): (Plan(32, 32, 32, 8, 1, 32, 8, 1),) * 2,
}
LINEAR = {
    ("half", 64): (Plan(0, 64, 64, 4, 2, 64, 4, 3), Plan(0, 128, 64, 4, 2, 128, 4, 3)),
    ("half", 128): (Plan(0, 64, 64, 4, 2, 64, 8, 2), Plan(0, 64, 64, 4, 2, 64, 8, 2)),
    ("full", 64): (Plan(0, 64, 64, 4, 1, 32, 4, 1), Plan(0, 64, 64, 4, 1, 32, 4, 1)),
    ("full", 128): (Plan(0, 32, 32, 4, 1, 32, 8, 1), Plan(0, 32, 32, 4, 1, 32, 8, 1)),
}
# programs a multiprocessor that sum states, as long as there are tokens enough: without decay, and with
PROGRAMS = 8
WALKS = 3

_OVERRIDES: dict[str, Plan] = {}


def choose(kind: str, dtype: torch.dtype, width: int, length: int) -> Plan:
    """The plan of "forward", "backward" or "linear" for a compute dtype, the wider of the two (padded) widths, and a length."""
    if kind in _OVERRIDES:
        return clipped(_OVERRIDES[kind], length)
    table = {"forward": FORWARD, "backward": BACKWARD, "linear": LINEAR}[kind]
    short, long = table["full" if dtype == torch.float32 else "half", 64 if width <= 64 else 128]
    return clipped(short if length <= SHORT else long, length)


class override:
    """Within it, every launch of ``kind`` takes this plan, or the chosen one with some sizes changed: for tests and tuning."""

    def __init__(self, kind: str, plan: Plan):
        self.kind, self.plan = kind, plan

    def __enter__(self):
        self.before = _OVERRIDES.get(self.kind)
        _OVERRIDES[self.kind] = self.plan

    def __exit__(self, *_):
        if self.before is None:
            del _OVERRIDES[self.kind]
        else:
            _OVERRIDES[self.kind] = self.before


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def segments(tiles: int, rows: int, device: torch.device, programs: int) -> tuple[int, int]:
    """Into how many segments the tiles of each of ``rows`` sequences are cut, and the tiles of one: ``programs`` a multiprocessor."""
    count = max(1, min(tiles, processors(device) * programs // rows))
    per_segment = -(-tiles // count)
    return -(-tiles // per_segment), per_segment


def clipped(plan: Plan, length: int) -> Plan:
    """The plan with blocks no longer than the sequence needs."""
    if length > plan.block // 2:
        return plan
    size = max(16, 1 << (length - 1).bit_length())
    sides = {name: min(getattr(plan, name), size) for name in ("rows", "columns", "state_columns")}
    return replace(plan, block=size, **sides)
