"""How times grow with the length: where one form overtakes another, and the ratio from one length to the next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

# the forms whose work is linear in the length and done in matrix products, and what they are to overtake
LINEAR = ("chunkwise", "fused")
QUADRATIC = ("parallel", "softmax")
GROUP = ("dtype", "decay", "pass")

Cell = Mapping[str, Any]


def groups(cells: Iterable[Cell]) -> dict[tuple[str, str, str], list[Cell]]:
    """(dtype, decay, pass) -> its cells, by length."""
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault(tuple(cell[key] for key in GROUP), []).append(cell)
    return {key: sorted(value, key=lambda cell: cell["length"]) for key, value in found.items()}


def times(cells: Iterable[Cell], form: str) -> dict[int, float]:
    """length -> median milliseconds of one form, where it was measured."""
    return {cell["length"]: cell["median_ms"] for cell in cells if cell["form"] == form and cell["median_ms"] is not None}


def crossover(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any]:
    """The length from which ``ours`` is the faster at every longer length that both were measured at.

    Args:
        ours, theirs: length -> time, in one unit.
    Returns:
        ``where``: "below" (faster at every measured length), "above" (not yet at the longest), "inside", or "unknown" (no length in
        common); ``length``: the crossing where it is inside, between two measured lengths on straight lines in log-log, else None;
        ``between``: those two lengths (where it is below or above, the shortest or the longest), else None.
    """
    lengths = sorted({*ours} & {*theirs})
    if not lengths:
        return {"where": "unknown", "length": None, "between": None}
    lead = [math.log(theirs[n] / ours[n]) for n in lengths]
    last = max((i for i, x in enumerate(lead) if x <= 0), default=-1)
    if last == -1:
        return {"where": "below", "length": None, "between": [lengths[0]]}
    if last == len(lengths) - 1:
        return {"where": "above", "length": None, "between": [lengths[-1]]}
    left, right = lengths[last], lengths[last + 1]
    share = -lead[last] / (lead[last + 1] - lead[last])
    return {"where": "inside", "length": left * (right / left) ** share, "between": [left, right]}


def crossovers(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Where each linear form overtakes the parallel form and softmax attention: one entry per dtype, decay, pass and pair of forms."""
    found = []
    for key, group in groups(cells).items():
        forms = {cell["form"] for cell in group}
        for form in LINEAR:
            for other in QUADRATIC:
                if {form, other} <= forms:
                    found.append(dict(zip(GROUP, key, strict=True)) | {"form": form, "overtakes": other})
                    found[-1] |= crossover(times(group, form), times(group, other))
    return found


def growth(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """The ratio of a form's times at one length and the next, and its exponent p where the time grows as length ** p."""
    found = []
    for key, group in groups(cells).items():
        for form in dict.fromkeys(cell["form"] for cell in group):
            measured = sorted(times(group, form).items())
            for (left, before), (right, after) in pairwise(measured):
                found.append(
                    dict(zip(GROUP, key, strict=True))
                    | {"form": form, "from": left, "to": right, "time_ratio": after / before}
                    | {"exponent": math.log(after / before) / math.log(right / left)}
                )
    return found


def sentence(entry: Mapping[str, Any]) -> str:
    """A crossover in words."""
    lengths = [f"{n:,}" for n in entry["between"] or ()]
    told = {
        "below": lambda: f"is faster than {entry['overtakes']} at every measured length, from {lengths[0]}",
        "above": lambda: f"is not yet faster than {entry['overtakes']} at {lengths[0]}, the longest measured in common",
        "inside": lambda: f"overtakes {entry['overtakes']} at about {entry['length']:,.0f} tokens (between {' and '.join(lengths)})",
        "unknown": lambda: f"and {entry['overtakes']} were not measured at a common length",
    }
    return f"{decay_name(entry['decay'])}, {entry['dtype']}, {pass_name(entry['pass'])}: {entry['form']} {told[entry['where']]()}."


def decay_name(decay: str) -> str:
    """A decay in words."""
    return {"none": "no decay", "fixed": "fixed decay", "selective": "selective decay", "vector": "selective decay per channel"}[decay]


def pass_name(part: str) -> str:
    """A pass in words."""
    return {"forward": "forward", "both": "forward + backward"}[part]
