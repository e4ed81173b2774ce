"""Sizes with which the kernels may be launched: few, each of which the GPU's tests hold against float64.

The first of a tuple is the default, the fastest of those measured on an H100; ``lba-bench tune`` measures them on the GPU at hand and keeps
the best (``tuned.py``). The last one is small: it fits where shared memory is short.
"""

from __future__ import annotations

from dataclasses import dataclass

Key = tuple[str, str, int, str]  # kind, precision, width, span


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


SHORT = 256  # tokens up to which a sequence is "short": a single block, by default

_HALF_64 = {
    ("forward", "short"): (
        Plan(256, 64, 32, 4, 3, 64, 4, 3),
        Plan(256, 64, 64, 4, 3, 64, 4, 3),
        Plan(128, 64, 32, 4, 2, 64, 4, 2),
        Plan(64, 64, 64, 4, 1, 64, 4, 1),
    ),
    ("forward", "long"): (
        Plan(128, 64, 32, 4, 1, 128, 4, 2),
        Plan(128, 64, 64, 4, 2, 64, 4, 2),
        Plan(64, 64, 64, 4, 1, 64, 4, 2),
        Plan(64, 64, 64, 4, 1, 64, 4, 1),
    ),
    ("backward", "short"): (
        Plan(256, 32, 64, 4, 2, 64, 4, 1, 168),
        Plan(256, 64, 64, 4, 2, 64, 4, 1),
        Plan(128, 32, 64, 4, 2, 64, 4, 1, 168),
        Plan(64, 32, 64, 4, 1, 64, 4, 1),
    ),
    ("backward", "long"): (
        Plan(128, 32, 64, 4, 2, 128, 4, 2, 168),
        Plan(128, 32, 64, 4, 1, 64, 4, 1, 168),
        Plan(64, 64, 64, 4, 1, 64, 4, 2),
        Plan(64, 32, 64, 4, 1, 64, 4, 1),
    ),
    ("linear", "short"): (Plan(0, 64, 64, 4, 2, 64, 4, 3), Plan(0, 128, 64, 4, 2, 128, 4, 3), Plan(0, 64, 64, 4, 1, 64, 4, 1)),
    ("linear", "long"): (Plan(0, 128, 64, 4, 2, 128, 4, 3), Plan(0, 64, 64, 4, 2, 64, 4, 3), Plan(0, 64, 64, 4, 1, 64, 4, 1)),
}
_HALF_128 = {
    ("forward", "short"): (Plan(256, 64, 32, 8, 2, 64, 8, 2), Plan(128, 64, 64, 8, 2, 64, 8, 2), Plan(32, 32, 32, 8, 1, 32, 8, 1)),
    ("forward", "long"): (Plan(128, 64, 64, 8, 2, 64, 8, 2), Plan(128, 64, 32, 8, 1, 64, 8, 1), Plan(32, 32, 32, 8, 1, 32, 8, 1)),
    ("backward", "short"): (Plan(128, 32, 64, 8, 1, 64, 8, 2), Plan(64, 32, 64, 8, 1, 64, 8, 1), Plan(32, 32, 32, 8, 1, 32, 8, 1)),
    ("backward", "long"): (Plan(128, 32, 64, 8, 1, 64, 8, 2), Plan(64, 32, 64, 8, 1, 64, 8, 1), Plan(32, 32, 32, 8, 1, 32, 8, 1)),
    ("linear", "short"): (Plan(0, 64, 64, 4, 2, 64, 8, 2), Plan(0, 64, 64, 8, 1, 32, 8, 1)),
    ("linear", "long"): (Plan(0, 64, 64, 4, 2, 64, 8, 2), Plan(0, 64, 64, 8, 1, 32, 8, 1)),
}
_FULL_64 = {
    "forward": (Plan(32, 32, 32, 4, 1, 32, 4, 1), Plan(64, 32, 32, 4, 1, 32, 4, 1)),
    "backward": (Plan(32, 32, 32, 4, 1, 32, 4, 1), Plan(64, 32, 32, 4, 1, 32, 4, 1)),
    "linear": (Plan(0, 64, 64, 4, 1, 32, 4, 1), Plan(0, 32, 64, 4, 1, 32, 4, 1)),
}
_FULL_128 = {
    "forward": (Plan(32, 32, 32, 8, 1, 32, 8, 1), Plan(16, 16, 16, 4, 1, 16, 8, 1)),
    "backward": (Plan(32, 32, 32, 8, 1, 32, 8, 1), Plan(16, 16, 16, 4, 1, 16, 8, 1)),
    "linear": (Plan(0, 32, 32, 4, 1, 32, 8, 1), Plan(0, 16, 32, 4, 1, 16, 8, 1)),
}
CANDIDATES: dict[Key, tuple[Plan, ...]] = {}
for _width, _half, _full in ((64, _HALF_64, _FULL_64), (128, _HALF_128, _FULL_128)):
    CANDIDATES |= {(kind, "half", _width, span): plans for (kind, span), plans in _half.items()}
    CANDIDATES |= {(kind, "full", _width, span): plans for kind, plans in _full.items() for span in ("short", "long")}
