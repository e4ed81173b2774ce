"""Batches of samples of like length: less padding, in an order that stays a function of (seed, epoch)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Buckets:
    """How an epoch's order is changed so that the samples of an optimizer step are of like length.

    Attributes:
        lengths: (samples,) integers, of all samples.
        step: samples of an optimizer step over all devices and batches, so that steps hold the same on any number of them.
        window: steps among which samples are sorted; the larger, the less padding and the less chance.
    """

    lengths: np.ndarray
    step: int
    window: int

    def sort(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A permutation (samples,) in which every ``window`` steps are sorted by length, and steps then shuffled; what makes no whole step
        stays last, as a batch that is not full has to."""
        steps = len(order) // self.step
        whole, rest = order[: steps * self.step], order[steps * self.step :]
        size = self.window * self.step
        found = [self._sorted(whole[start : start + size]).reshape(-1, self.step) for start in range(0, len(whole), size)]
        if found:
            whole = np.concatenate(found)[rng.permutation(steps)].reshape(-1)
        return np.concatenate([whole, self._sorted(rest)])

    def facts(self) -> dict[str, int]:
        return {"bucket_steps": self.window, "step_samples": self.step}

    def _sorted(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(self.lengths[rows], kind="stable")]
