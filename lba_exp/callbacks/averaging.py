"""The moving average of a run's weights, which is what is validated, tested and kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class MovingAverage(WeightAveraging):
    """Lightning's weight averaging with ``d * average + (1 - d) * weights`` after each optimizer step; the first step is copied.

    From the start of a validation to its end, for all callbacks but those that write checkpoints, the module has the averaged weights. A
    checkpoint's ``state_dict`` is the average, so that a test, ``init_from`` and ``lba-eval`` need to know nothing of it; the weights that
    training goes on with are beside it. Buffers of floating numbers are averaged too (statistics of batch norm), others are copied.

    Args:
        decay: d, from 0 to below 1; about 1 / (1 - d) steps count.
    """

    def __init__(self, decay: float):
        def average(averages: Sequence[Tensor], current: Sequence[Tensor], number: Tensor) -> None:
            # Lightning's and torch's own would take the average of whole numbers (the order of a scan), and cut it
            if averages[0].is_floating_point():
                torch._foreach_lerp_(averages, current, 1 - decay)
            else:
                torch._foreach_copy_(averages, current)

        super().__init__(multi_avg_fn=average)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the module is moved there later: the average would stay on the CPU
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*WeightAveraging callback with a model that overrides the configure_model.*")
            super().setup(trainer, pl_module, stage)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not yet: callbacks measure the weights at this point."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
