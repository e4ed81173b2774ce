"""How the kernels are launched: which plan, and how many segments a long sequence is cut into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
import triton

from lba_exp.ops.fused import tuned
from lba_exp.ops.fused.candidates import CANDIDATES, SHORT, Key, Plan

# programs a multiprocessor that sum states, as long as there are tokens enough: without decay, and with
PROGRAMS = 8
WALKS = 3

_OVERRIDES: dict[str, Plan] = {}
_TOO_LARGE: set[tuple[str | None, Key, Plan]] = set()  # on which GPU what did not fit

T = TypeVar("T")


def key_of(kind: str, dtype: torch.dtype, width: int, length: int) -> Key:
    """Where the candidates stand for "forward", "backward" or "linear", a compute dtype, the wider (padded) width, and a length."""
    return kind, "full" if dtype == torch.float32 else "half", 64 if width <= 64 else 128, "short" if length <= SHORT else "long"


def with_plan(kind: str, dtype: torch.dtype, width: int, length: int, device: torch.device, run: Callable[[Plan], T]) -> T:
    """``run`` under the plan for such inputs: the one overriding all, else that which tuning found for this GPU, else the first candidate.

    One whose kernels do not fit the GPU (its shared memory) gives way to the next candidate, now and later.
    """
    if kind in _OVERRIDES:
        return run(clipped(_OVERRIDES[kind], length))
    key, name = key_of(kind, dtype, width, length), device_name(device)
    listed = candidates(key, name)
    for plan in listed:
        if (name, key, plan) not in _TOO_LARGE:
            try:
                return run(clipped(plan, length))
            except triton.runtime.errors.OutOfResources:
                if plan == listed[-1]:
                    raise
                _TOO_LARGE.add((name, key, plan))
    return run(clipped(listed[-1], length))


def candidates(key: Key, device: str | None) -> tuple[Plan, ...]:
    """The candidates in the order in which they are tried on a GPU of that name."""
    best = None if device is None else tuned.plans(device).get(key)
    return CANDIDATES[key] if best is None else tuple(dict.fromkeys((best, *CANDIDATES[key])))


@functools.cache
def device_name(device: torch.device) -> str | None:
    """The name of a GPU; None where there is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


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
