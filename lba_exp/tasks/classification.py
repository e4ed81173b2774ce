"""Classification of sequences as a LightningModule: loss, metrics, optimizer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lba_exp.models.pretrained import MODEL_CONFIG
from lba_exp.nn.blocks import CompiledBlocks, MixerStack
from lba_exp.nn.compiled import CompiledModule, own_gradients
from lba_exp.nn.decay_groups import weight_decay_groups
from lba_exp.nn.inputs import further_inputs
from lba_exp.tasks.many_devices import SequenceSplit, StepTargets, batch_weight, restore, scale_gradients, shard_where_wanted, sums
from lba_exp.tasks.means import SampleMean
from lba_exp.tasks.metrics import score, split_metrics
from lba_exp.tasks.mixing import Mixing, hard

TRAIN_MEANS = "train_means"  # key of a checkpoint


def rate_over_peak(step: int, total: int, warmup_fraction: float, final_fraction: float, schedule: str = "cosine") -> float:
    """Learning rate over peak rate before optimizer step ``step`` (0-based) of ``total``: a linear rise, then half a cosine, or a line
    (``schedule="linear"``), down to ``final_fraction``."""
    warmup = round(warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final_fraction + (1 - final_fraction) * left


def total_steps(trainer: pl.Trainer) -> int:
    """Optimizer steps of a whole run.

    Trainer.estimated_stepping_batches would set the training loader up before the checkpoint is read, and its place in the data would then
    not be restored (seen in Lightning 2.6).
    """
    if trainer.max_epochs in (None, -1):
        return trainer.max_steps
    steps = steps_an_epoch(trainer) * trainer.max_epochs
    return min(steps, trainer.max_steps) if trainer.max_steps != -1 else steps


def steps_an_epoch(trainer: pl.Trainer) -> int:
    """Optimizer steps of an epoch."""
    batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return math.ceil(batches / trainer.accumulate_grad_batches)


def scaled_rate(lr: float, lr_batch: int | None, trainer: pl.Trainer) -> float:
    """The peak rate: ``lr`` times the samples of an optimizer step on all devices over ``lr_batch`` (arXiv 1706.02677); None: ``lr``."""
    if lr_batch is None:
        return lr
    data = trainer.datamodule
    batches = trainer.world_size // data.sequence_parallel_size * trainer.accumulate_grad_batches
    return lr * data.batch_size * batches / lr_batch


class Classification(pl.LightningModule):
    """Trains ``model(inputs, padding_mask) -> (B, classes)`` on batches {"inputs", "labels", optional "padding_mask"}.

    Metrics of a split are means over its samples, each counted once, on any number of devices. Those of the training split are means since
    the last validation; they are part of the checkpoint, so that an interrupted run reports what an uninterrupted one does.

    The loss of an optimizer step is the mean over its samples, each counted once, on any number of devices and in any number of batches.

    Attributes:
        targets_vary: what a subclass's loss is a mean over is not as many targets for each sample: ``logits_and_labels`` tells how many.

    Args:
        model: the classifier.
        classes: number of classes; 1: labels are numbers, (B,) of a floating dtype, and the loss is the mean squared error.
        optim: the settings of ``OptimSchema`` as a plain dict.
        seed: the run's seed; dropout in batch i of epoch e is a function of (seed, e, i, rank).
        hyper_parameters: the resolved configuration as a plain dict, kept in the checkpoint.
        metrics: of validation and test, see ``split_metrics``.
        mixing: settings of ``Mixing``, which training batches go through; None: none. Accuracy in training then counts the class with the
            largest share as the right one.
        monitor: "val/score" where the mean of these metrics, logged as the score, is what chooses the best checkpoint; else the accuracy.
    """

    targets_vary = False

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        optim: dict[str, Any],
        seed: int = 0,
        hyper_parameters: dict[str, Any] | None = None,
        metrics: Sequence[str] = ("accuracy",),
        monitor: str = "val/accuracy",
        mixing: dict[str, float] | None = None,
    ):
        super().__init__()
        self.model = model
        self._compiled: Callable[[], AbstractContextManager] = nullcontext
        self._graphs = False  # whether CUDA graphs are recorded
        self._step_begins = False  # whether the training batch is the first of its optimizer step
        self.optim = dict(optim)
        self.seed = seed
        if hyper_parameters:
            self.save_hyperparameters(hyper_parameters, logger=False)
        # in training unchecked: a look at the labels would wait for the device in every step
        self.train_loss, self.train_metrics = SampleMean(), split_metrics((), classes, checked=False)
        self.val_loss, self.val_metrics = SampleMean(), split_metrics(metrics, classes)
        self.test_loss, self.test_metrics = SampleMean(), split_metrics(metrics, classes)
        self.scored = tuple(metrics) if monitor == "val/score" else ()
        self._mixing = None if mixing is None else Mixing(classes, **mixing)
        self._targets = StepTargets()
        self._split = SequenceSplit()
        self._trained = False  # whether the training means hold anything; the same on every device

    def compile_model(self, *, graphs: bool = False) -> None:
        """Training, validation and test run the model compiled from now on: its blocks, see ``CompiledBlocks`` (a model without blocks is
        compiled whole), or, with ``graphs``, all of it for each shape by itself, as CUDA graphs, see ``CompiledModule``. ``self.model``
        itself stays as it is. ConfigError for a model that cannot be recorded."""
        self._graphs = graphs
        if graphs:
            part = self._recorded_part()
            self._compiled = CompiledModule(part, graphs=True, clone=part is self.model)  # metrics may keep the logits
        elif any(isinstance(module, MixerStack) for module in self.model.modules()):
            self._compiled = CompiledBlocks(self.model)
        else:
            self._compiled = CompiledModule(self.model)

    def _recorded_part(self) -> nn.Module:
        """The part of the model all of whose tensors have the same shape whenever its inputs have."""
        return self.model

    def split_sequences(self, size: int) -> None:
        """Sequences are split over ``size`` devices each from now on, see ``SequenceSplit``."""
        self._split = SequenceSplit(size)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._split.share(self.trainer, self.model, batch)

    def logits(self, batch: dict[str, Tensor], **further: Tensor) -> Tensor:
        """What the model, compiled where that was asked for, gives for a batch; ``further`` arguments beside those in the batch."""
        with self._compiled():
            return self.model(batch["inputs"], **further_inputs(batch), **further)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, classes) of a batch."""
        return self.logits(batch)

    def logits_and_labels(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(n, classes) and (n,): what loss and accuracy are computed from."""
        return self(batch), batch["labels"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # A state of the generator that depends on the position alone makes a resumed run repeat the uninterrupted one.
        words = [self.seed, self.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int.from_bytes(hash_words(words)[:8], "little"))
        self._step_begins = batch_idx % self.trainer.accumulate_grad_batches == 0
        if self._graphs and self._step_begins:
            self.zero_grad()  # they lie in the graphs' memory, which the forward pass writes to before Lightning drops them

    def on_after_backward(self) -> None:
        if self._graphs and self._step_begins and self.trainer.accumulate_grad_batches > 1:
            own_gradients(self.parameters())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, labels = self.logits_and_labels(batch if self._mixing is None else self._mixing(batch))
        loss = mean_loss(logits, labels, self.optim["label_smoothing"])
        weight, self._trained = batch_weight(self.trainer, batch_idx), True
        if weight and self._counted(labels):
            self.train_loss.update(loss.detach(), len(logits))
            for metric in self.train_metrics.values():
                metric.update(logits.detach(), hard(labels))
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        if self.targets_vary:
            weight = self._targets.weight(self.trainer, batch_idx, len(labels) if weight else 0, loss.device)
        return loss if isinstance(weight, float) and weight == 1 else loss * weight

    def _counted(self, labels: Tensor) -> bool:
        """Whether metrics take this device's labels: each once, and a block of a sequence may hold none."""
        return len(labels) > 0 and (self.targets_vary or self._split.counts(self.trainer))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.targets_vary and self.trainer.accumulate_grad_batches > 1:
            scale_gradients(self.parameters(), self.step_correction())

    def step_correction(self) -> Tensor | float:
        """What the mean over devices and batches of an optimizer step's losses is multiplied by, for the step's own."""
        return self._targets.correction(self.trainer) if self.targets_vary else 1.0

    def take_train_metrics(self) -> dict[str, float]:
        """Means over the training samples since the last call; an empty dict where there were none."""
        if not self._trained:
            return {}
        values = {f"train/{name}": float(metric.compute()) for name, metric in self._train_means().items()}
        for metric in self._train_means().values():
            metric.reset()
        self._trained = False
        return values

    def _train_means(self) -> dict[str, Metric]:
        return {"loss": self.train_loss, **self.train_metrics}

    def configure_model(self) -> None:
        # blocks are then compiled there: the gathering of weights around them cannot be
        if shard_where_wanted(self, compiled=self._compiled is not nullcontext):
            self._compiled = nullcontext
        self._split.join(self.trainer, self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[TRAIN_MEANS] = sums(self._train_means())
        checkpoint[MODEL_CONFIG] = getattr(self.model, "config", None)  # the model can be built without the data

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint.get(TRAIN_MEANS, {})
        restore(self._train_means(), kept, first=self.global_rank == 0)
        self._trained = bool(kept) and float(kept["loss"]["samples"]) > 0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        # The best checkpoint is the one of highest accuracy or score, among equals the one of lowest loss: small splits have many equals.
        value = self._log_score("val") if self.scored else self.val_metrics["accuracy"].compute() if "accuracy" in self.val_metrics else 0.0
        self.log("val/selection", float(value) - 1e-6 * min(float(self.val_loss.compute()), 1e3), logger=False, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        if self.scored:
            self._log_score("test")

    def _log_score(self, split: str) -> Tensor:
        value = score(getattr(self, f"{split}_metrics"), self.scored)
        self.log(f"{split}/score", value, logger=False, sync_dist=True)
        return value

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Logits (n, classes) and labels (n,) of the batch, for callbacks."""
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], split: str) -> dict[str, Tensor]:
        logits, labels = self.logits_and_labels(batch)
        loss, metrics = getattr(self, f"{split}_loss"), getattr(self, f"{split}_metrics")
        if self._counted(labels):
            loss.update(mean_loss(logits, labels), len(logits))
            for metric in metrics.values():
                metric.update(logits, labels)
        # logger=False: the recorder callback writes every row, so that a step has one row
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, logger=False)
        for name, metric in metrics.items():
            self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True, logger=False, prog_bar=split == "val")
        return {"logits": logits, "labels": labels}

    def configure_optimizers(self) -> dict[str, Any]:
        o = self.optim
        rate = scaled_rate(o["lr"], o.get("lr_batch"), self.trainer)
        # torch's AdamW multiplies the decay by the rate: over the peak rate it becomes a share of each step, times rate / peak rate
        decay = o["weight_decay"] / rate if o.get("decay_per_step") else o["weight_decay"]
        groups = weight_decay_groups(self.model, decay)
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=tuple(o["betas"]), eps=o["eps"])
        total, warmup = total_steps(self.trainer), o["warmup_fraction"]
        if o.get("warmup_epochs") is not None:
            warmup = min(1.0, o["warmup_epochs"] * steps_an_epoch(self.trainer) / total)
        course = (total, warmup, o["final_fraction"], o.get("schedule", "cosine"))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_over_peak(step, *course))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def mean_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross entropy in float32, (n, classes) and (n,) or, mixed, (n, classes) -> (); 0 where n is 0. For one class, the mean
    squared error."""
    if not len(labels):
        return logits.float().sum()
    if logits.shape[-1] == 1:
        return nn.functional.mse_loss(logits.squeeze(-1).float(), labels.float())
    return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def hash_words(words: list[int]) -> bytes:
    """A digest of whole numbers, the same on every machine and run."""
    return hashlib.sha256(",".join(map(str, words)).encode()).digest()
