"""A run whose loss is no longer a number stops, before its weights are saved over good ones."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lba_exp.callbacks.checkpoints import LAST
from lba_exp.errors import TrainingError

SHOWN = 8  # samples named in the sentence; train.log holds them all


class Divergence(pl.Callback):
    """Raises ``TrainingError`` at the first training batch whose loss is not finite; before a validation of weights that are not; and where
    the validation loss is not.

    On a GPU, or on several devices, the loss is looked at without waiting for the device: the answer is read every
    ``trainer.log_every_n_steps`` steps, before each validation and before each checkpoint is written. It names the first such batch all the
    same, whichever device's it was. All devices stop together.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # number, since the last look, of the first batch whose loss is not finite; -1: none
        self._batches: list[tuple[int, int, int]] = []  # (epoch, batch, step) since the last look
        self._losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = (outputs["loss"] if isinstance(outputs, dict) else outputs).detach()
        number = len(self._batches)
        self._batches.append((trainer.current_epoch, batch_idx, trainer.global_step))
        self._losses.append(loss)
        first = loss.new_full((), -1, dtype=torch.long) if self._first is None else self._first
        self._first = torch.where((first < 0) & ~torch.isfinite(loss), number, first)
        at_once = loss.device.type == "cpu" and trainer.world_size == 1
        if at_once or (batch_idx + 1) % max(1, trainer.log_every_n_steps) == 0:
            self._look(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._look(trainer)
        mine = [p.to_local() if isinstance(p, DTensor) else p for p in (p.detach() for p in pl_module.parameters())]
        norms = torch._foreach_norm([p for p in mine if p.numel()])
        wrong = bool(norms) and not bool(torch.stack([n.double() for n in norms]).isfinite().all())
        if trainer.strategy.reduce_boolean_decision(wrong, all=False) if trainer.world_size > 1 else wrong:
            raise TrainingError(
                f"training diverged: the weights are no numbers any more after step {trainer.global_step}. {advice(trainer)}"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        loss = trainer.callback_metrics.get("val/loss")  # the same on every device
        if loss is not None and not math.isfinite(float(loss)):
            raise TrainingError(
                f"training diverged: the validation loss is {float(loss)} after step {trainer.global_step}. {advice(trainer)}"
            )

    def _look(self, trainer: pl.Trainer) -> None:
        """Read what the device found; forget the batches that were fine."""
        batches, losses = self._batches, self._losses
        found, device = -1 if self._first is None else int(self._first), 0
        ranks = trainer.world_size
        if ranks > 1:  # the earliest batch, then the lowest device: what came after it diverged for its sake
            place = (found if found >= 0 else len(batches)) * ranks + trainer.global_rank
            place = torch.tensor(place, device=trainer.strategy.root_device)
            found, device = divmod(int(trainer.strategy.reduce(place, reduce_op="min")), ranks)
            found = found if found < len(batches) else -1
        self._first, self._batches, self._losses = None, [], []
        if found < 0:
            return
        epoch, number, step = batches[found]
        loss = float(losses[found]) if ranks == 1 else trainer.strategy.broadcast(float(losses[found]), src=device)
        samples = _samples(trainer, epoch, number, device)
        on = f" on device {device + 1} of {ranks}" if ranks > 1 else ""
        if trainer.is_global_zero:
            log = logging.getLogger("lba_exp")
            log.error("loss %s%s in epoch %d, batch %d, training samples %s", loss, on, epoch + 1, number + 1, samples)
        shown = ", ".join(map(str, samples[:SHOWN])) + (", ..." if len(samples) > SHOWN else "")
        where = f"epoch {epoch + 1}, batch {number + 1}{on}" + (f", training samples {shown}" if samples else "")
        raise TrainingError(f"training diverged: the loss is {loss} at step {step} ({where}). {advice(trainer)}")


def _samples(trainer: pl.Trainer, epoch: int, number: int, device: int) -> list[int]:
    order = copy.copy(getattr(trainer.train_dataloader, "order", None))
    if order is None:
        return []
    order.rank = device * order.world_size // trainer.world_size  # devices that share sequences have the same
    return (order.batches(epoch)[number] % order.distinct).tolist()


def advice(trainer: pl.Trainer) -> str:
    """Where the last good weights are, and what to change."""
    last = Path(trainer.default_root_dir) / "checkpoints" / LAST
    half = ", or trainer.precision=bf16-mixed" if str(trainer.precision).startswith("16") else ""
    kept = f"The last good checkpoint is {last}." if last.is_file() else "No checkpoint was written before."
    return f"{kept} Try a lower optim.lr, or trainer.gradient_clip_val=1{half}."
