"""How the kernels are launched: block and tile sizes by dtype and width, and how many segments a long sequence is cut into."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Plan:
    """Sizes of one launch. Results differ between plans by rounding alone.

    Attributes:
        block: tokens of a block, between whose borders states are carried (CB).
        columns: keys at a time inside a block (BT), at most ``block``.
        state_columns: tokens at a time where states are summed (BT there), at most ``block``.
        programs: segments a multiprocessor, as long as there are blocks enough.
        warps, stages: of the kernel that writes outputs or gradients.
        state_warps, state_stages: of the kernel that sums states.
        registers, state_registers: the most that a thread of either may take; None: what the compiler takes.
    """

    block: int
    columns: int
    state_columns: int
    programs: int
    warps: int
    stages: int
    state_warps: int
    state_stages: int
    registers: int | None = None
    state_registers: int | None = None


# forward and backward plans by compute dtype and width
FORWARD = {
    ("half", 64): Plan(64, 64, 64, 8, 4, 1, 8, 3),
    ("half", 128): Plan(64, 64, 64, 8, 8, 1, 8, 2),
    ("full", 64): Plan(32, 32, 32, 8, 4, 1, 4, 1),
    ("full", 128): Plan(32, 32, 32, 8, 8, 1, 8, 1),
}
BACKWARD = {
    ("half", 64): Plan(64, 64, 64, 8, 8, 1, 8, 2),
    ("half", 128): Plan(64, 64, 64, 8, 8, 1, 8, 2),
    ("full", 64): Plan(32, 32, 32, 8, 4, 1, 4, 1),
    ("full", 128): Plan(32, 32, 32, 8, 8, 1, 8, 1),
}
# without decay: block is the tile of rows
LINEAR = {
    ("half", 64): Plan(128, 64, 64, 8, 4, 2, 4, 3),
    ("half", 128): Plan(64, 64, 64, 8, 4, 2, 8, 2),
    ("full", 64): Plan(64, 64, 32, 8, 4, 1, 4, 1),
    ("full", 128): Plan(32, 32, 32, 8, 4, 1, 8, 1),
}

_OVERRIDES: dict[str, Plan] = {}


def choose(kind: str, dtype: torch.dtype, width: int) -> Plan:
    """The plan of "forward", "backward" or "linear" for a compute dtype and the wider of the two (padded) widths."""
    if kind in _OVERRIDES:
        return _OVERRIDES[kind]
    table = {"forward": FORWARD, "backward": BACKWARD, "linear": LINEAR}[kind]
    return table["full" if dtype == torch.float32 else "half", 64 if width <= 64 else 128]


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


def segments(blocks: int, rows: int, device: torch.device, per_processor: int) -> tuple[int, int]:
    """Into how many segments the blocks of each of B H sequences (``rows``) are cut, and the blocks of one: enough to fill the GPU."""
    count = max(1, min(blocks, processors(device) * per_processor // rows))
    per_segment = -(-blocks // count)
    return -(-blocks // per_segment), per_segment


def clipped(plan: Plan, length: int) -> Plan:
    """The plan with blocks no longer than the sequence needs."""
    if length > plan.block // 2:
        return plan
    size = max(16, 1 << (length - 1).bit_length())
    return replace(plan, block=size, columns=min(plan.columns, size), state_columns=min(plan.state_columns, size))
