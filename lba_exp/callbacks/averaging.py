"""The moving average of a run's weights, which is what is validated, tested and kept."""

from __future__ import annotations

import warnings
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn


class MovingAverage(WeightAveraging):
    """Lightning's weight averaging with ``d * average + (1 - d) * weights`` after each optimizer step; the first step is copied.

    From the start of a validation to its end, for all callbacks but those that write checkpoints, the module has the averaged weights. A
    checkpoint's ``state_dict`` is the average, so that a test, ``init_from`` and ``lba-eval`` need to know nothing of it; the weights that
    training goes on with are beside it. Buffers of floating numbers are averaged too (statistics of batch norm), others are copied.

    Args:
        decay: d, from 0 to below 1; about 1 / (1 - d) steps count.
    """

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the module is moved there later: the average would stay on the CPU
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*WeightAveraging callback with a model that overrides the configure_model.*")
            super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        # torch's own update waits for the device at every step, and takes the average of whole numbers (the order of a scan) too
        if trainer.global_step == self._latest_update_step:
            return
        weight = 1 - self.decay if self._latest_update_step else 1.0
        pairs = list(zip(_tensors(self._average_model.module), _tensors(pl_module), strict=True))
        for floating, update in ((True, lambda a, b: torch._foreach_lerp_(a, b, weight)), (False, torch._foreach_copy_)):
            if chosen := [pair for pair in pairs if pair[0].is_floating_point() == floating]:
                update(*map(list, zip(*chosen, strict=True)))
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not yet: callbacks measure the weights at this point."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
