"""Means over samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class SampleMean(Metric):
    """The mean of a number over samples, given as means over batches; NaN stays NaN.

    (torchmetrics' own ``MeanMetric`` leaves diverged batches out, or, told not to, forgets the weights: seen in 1.9.)
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, mean: Tensor, samples: int) -> None:
        """Adds a batch of ``samples`` with this mean."""
        self.total += mean * samples
        self.samples += samples

    def compute(self) -> Tensor:
        return self.total / self.samples
