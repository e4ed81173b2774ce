"""A run that is asked to end saves where it stands, and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lba_exp.callbacks.checkpoints import LAST, validation_due
from lba_exp.devices.signals import Requests
from lba_exp.errors import Terminated


class Preemption(pl.Callback):
    """Raises ``Terminated`` after the optimizer step in which a process of the run was asked to end, once that step is saved.

    All processes of a run stop at the same step, whichever was asked; on several GPUs that is a step later, so that no step waits for the
    one before. Where a validation is due, the run goes on past it: Lightning 2.6 would leave that validation out on resume. In the test
    nothing is left to be saved.

    Args:
        requests: what was asked of this process.
        folder: that of the checkpoints; None: the run keeps none.
    """

    def __init__(self, requests: Requests, folder: Path | None):
        self.requests, self.folder = requests, folder
        self._before: Tensor | None = None  # which signal any process had got at the end of the step before; 0: none

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.requests.listen()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.requests.listen()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loop = trainer.fit_loop.epoch_loop
        stepped = loop._accumulated_batches_reached() or loop._num_ready_batches_reached()
        if not stepped or validation_due(trainer, batch_idx):
            return
        asked = self.requests.received
        if trainer.world_size > 1:
            asked = self._anywhere(trainer)
            self.requests.received = asked or self.requests.received
        if asked:
            self._end(trainer)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        if self.requests.received is not None:
            raise Terminated(f"the run was stopped by {self.requests.name} in its test: the same command tests it anew.")

    def _anywhere(self, trainer: pl.Trainer) -> int:
        """The signal that a process of the run has got, the same answer for all of them; 0: none."""
        device = trainer.strategy.root_device
        now = torch.tensor(self.requests.received or 0, device=device)
        torch.distributed.all_reduce(now, op=torch.distributed.ReduceOp.MAX)
        before, self._before = self._before, now
        if device.type == "cpu":
            return int(now)
        return 0 if before is None else int(before)

    def _end(self, trainer: pl.Trainer) -> None:
        stopped = f"the run was stopped by {self.requests.name} after step {trainer.global_step}"
        if self.folder is None:
            raise Terminated(f"{stopped}; it keeps no checkpoints, so the same command starts it anew.")
        trainer.save_checkpoint(self.folder / LAST)
        raise Terminated(f"{stopped}, which is saved: the same command goes on from there.")
