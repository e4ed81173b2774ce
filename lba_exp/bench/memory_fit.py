"""Does the recurrent form keep O(L d) memory? A straight line through its peak memory against the tokens, beside what a block must hold."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from lba_exp.ops.recurrent import SEGMENT

FORM = "recurrent"
SHORTEST = 2 * SEGMENT  # tokens of a sequence: the form gathers SEGMENT of them at a time, and the next ones while it holds the last ones
FEWEST = 3  # points that a line is drawn through: two lie on every line

Cell = Mapping[str, Any]


def fit(tokens: Iterable[float], memory: Iterable[float]) -> tuple[float, float, float]:
    """Slope, intercept and R^2 (1 where all are equal) of the line with the least squared error."""
    x, y = list(tokens), list(memory)
    slope, intercept = statistics.linear_regression(x, y)
    mean = statistics.fmean(y)
    spread = sum((b - mean) ** 2 for b in y)
    missed = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return slope, intercept, 1.0 - missed / spread if spread else 1.0


def fits(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """A line for each model whose recurrent form was measured at FEWEST or more numbers of tokens from SHORTEST on.

    An entry holds ``model``, ``points``, ``shortest`` and ``longest`` (tokens of all sequences together), ``bytes_per_token`` (the slope
    of ``forward_bytes``, without weights and inputs), ``intercept_bytes``, ``r_squared``, ``predicted_bytes_per_token`` (of
    ``model_counts.read_counts``), ``over_predicted``, ``state_size`` (numbers of a sequence's states; None where it is not the same at
    every size) and ``state_constant``.
    """
    found = []
    measured = [c for c in cells if c["form"] == FORM and c["forward_bytes"] is not None and c["tokens"] >= SHORTEST]
    for model in dict.fromkeys(c["model"] for c in measured):
        own = [c for c in measured if c["model"] == model]
        tokens = [c["tokens"] * c["batch"] for c in own]
        if len(set(tokens)) < FEWEST:
            continue
        slope, intercept, r_squared = fit(tokens, [c["forward_bytes"] for c in own])
        predicted, sizes = own[-1]["token_bytes"], {c["state_size"] for c in own}
        found.append(
            {
                "model": model,
                "points": len(own),
                "shortest": min(tokens),
                "longest": max(tokens),
                "bytes_per_token": slope,
                "intercept_bytes": intercept,
                "r_squared": r_squared,
                "predicted_bytes_per_token": predicted,
                "over_predicted": slope / predicted,
                "state_size": next(iter(sizes)) if len(sizes) == 1 else None,
                "state_constant": len(sizes) == 1,
            }
        )
    return found
