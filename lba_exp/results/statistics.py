"""Means over seeds, their spread, and the comparison of two models on the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SPREADS = {
    "std": "standard deviation",
    "ci95": "half-width of the 95% confidence interval of the mean (Student t)",
    "none": "",
}
MOST_FLIPS = 20  # pairs up to which all 2^n sign flips are counted


def spread(values: Sequence[float], kind: str) -> float | None:
    """Standard deviation (n - 1 in the denominator), or half the width of the mean's 95% confidence interval; None below two values."""
    if len(values) < 2 or kind == "none":
        return None
    deviation = statistics.stdev(values)
    if kind == "std":
        return deviation
    from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats takes three times as long to import

    return float(stdtrit(len(values) - 1, 0.975)) * deviation / math.sqrt(len(values))


@dataclass(frozen=True)
class Comparison:
    """Two models on the seeds that both have.

    Attributes:
        pairs: number of common seeds.
        difference: mean of (value - baseline's value); None without pairs.
        p_t: two-sided p of the paired t-test; None below two pairs and where all differences are equal.
        p_permutation: two-sided p of the exact sign-flip test on the mean difference; None below two pairs and above ``MOST_FLIPS``.
    """

    pairs: int
    difference: float | None
    p_t: float | None
    p_permutation: float | None


def compare_paired(values: Mapping[object, float], baseline: Mapping[object, float]) -> Comparison:
    """Compare the values of two models, seed -> value, over the seeds that both have."""
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    n = len(differences)
    if n < 2:
        return Comparison(n, differences[0] if n else None, None, None)
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    p_t = None
    if deviation > 1e-12 * max(map(abs, differences)):
        from scipy.special import stdtr

        p_t = float(2 * stdtr(n - 1, -abs(mean) / (deviation / math.sqrt(n))))
    return Comparison(n, mean, p_t, sign_flip_p(differences) if n <= MOST_FLIPS else None)


def sign_flip_p(differences: Sequence[float]) -> float:
    """The share of the 2^n choices of signs whose sum is at least as far from 0 as that of the differences as they are.

    With n pairs it is never below 2 / 2^n (the signs as they are, and all turned round): 0.25 for n = 3.
    """
    import numpy as np

    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    slack = 1e-12 * float(np.sum(np.abs(differences)))
    return float(np.mean(np.abs(sums) >= abs(math.fsum(differences)) - slack))
