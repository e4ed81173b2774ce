"""What a task does so that it is the same on any number of devices: losses weighed, sums joined, weights sharded where that is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from lba_exp.devices.sharding import shard
from lba_exp.errors import ConfigError


def batch_weight(trainer: pl.Trainer, batch_idx: int) -> float:
    """What the mean loss of a training batch is multiplied by, so that an optimizer step has the mean over its samples: 1 for full batches.

    The last batches of an epoch may have other sizes from device to device (``EpochOrder.weight``); 1 for loaders without an order.
    """
    order = getattr(trainer.train_dataloader, "order", None)
    if order is None or not order.equal_shards:
        return 1.0
    return order.weight(batch_idx, trainer.accumulate_grad_batches, int(trainer.num_training_batches))


class StepTargets:
    """The targets of an optimizer step on all devices, for a loss that is a mean over targets whose number is only known from the batch.

    The step is then that of the mean over all its targets, each counted once, however they fall onto devices and batches: devices are
    weighed within each batch, by their targets as a share of all devices' targets of the step's first batch. With that the gradient is
    the right one where a step has one batch; where it has several, one factor is missing, ``correction``, once they have all been seen.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # targets of the step's first batch, over all devices
        self._total: Tensor | None = None  # those of all its batches so far

    def weight(self, trainer: pl.Trainer, batch_idx: int, targets: int, device: torch.device) -> Tensor | float:
        """What the mean loss of this device's training batch is multiplied by; every device calls.

        Args:
            batch_idx: of the batch in its epoch, from 0.
            targets: that the mean is taken over; 0: the batch does not count.
            device: where the sum over the devices is formed.
        """
        if trainer.world_size == 1 and trainer.accumulate_grad_batches == 1:
            return 1.0
        here = torch.tensor(float(targets), device=device)
        everywhere = here.clone()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(everywhere)  # Lightning's reduce waits for the device
        first = batch_idx % trainer.accumulate_grad_batches == 0
        self._first, self._total = (everywhere, everywhere) if first else (self._first, self._total + everywhere)
        return here * trainer.world_size / self._first

    def correction(self, trainer: pl.Trainer) -> Tensor | float:
        """What the step's gradient and loss are multiplied by, after its last batch."""
        if trainer.accumulate_grad_batches == 1:
            return 1.0
        return trainer.accumulate_grad_batches * self._first / self._total


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
    """Multiplies gradients in place, sharded ones piece by piece."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_([gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients], factor)


def shard_where_wanted(module: pl.LightningModule, *, compiled: bool) -> bool:
    """Shards ``module.model`` under FSDP2, compiled where ``compiled``; call it in ``configure_model``. Returns whether it did."""
    strategy = module.trainer.strategy
    sharded = isinstance(strategy, ModelParallelStrategy)
    if sharded:
        shard(module.model, strategy.device_mesh["data_parallel"], compiled=compiled)
    return sharded


class SequenceSplit:
    """Which devices share sequences, a block of consecutive tokens each: ``size`` consecutive ones.

    All of them get the same batches. Where a loss is that of whole sequences it is the same on each, and where it is that of tokens,
    ``StepTargets`` weighs the devices: either way the mean over all devices that a strategy forms of gradients is the step's own.

    Args:
        size: 1: none do.
    """

    def __init__(self, size: int = 1):
        self.size = size
        self._group: torch.distributed.ProcessGroup | None = None

    def join(self, trainer: pl.Trainer, model: nn.Module) -> None:
        """Tells the model of its group; call it in ``configure_model``, on all devices. Raises ConfigError, naming a layer that cannot."""
        if self.size == 1:
            return
        if is_overridden("on_before_batch_transfer", trainer.datamodule):  # Lightning would call that one, and no batch would be split
            raise ConfigError(
                f"sequence_parallel_size={self.size} does not go with an on_before_batch_transfer of the data module: leave it out."
            )
        if self._group is None:  # beside the one that gradients are joined in
            self._group, _ = torch.distributed.new_subgroups(self.size)
        try:
            model.set_sequence_group(self._group)
        except ValueError as error:
            raise ConfigError(f"sequence_parallel_size={self.size}: {error}.") from None

    def share(self, trainer: pl.Trainer, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """This device's part of a batch."""
        if self.size == 1:
            return batch
        try:
            return model.share(batch, trainer.global_rank % self.size, self.size)
        except ValueError as error:
            raise ConfigError(f"sequence_parallel_size={self.size}: {error}.") from None

    def counts(self, trainer: pl.Trainer) -> bool:
        """Whether this device's figures of whole sequences are counted: once for all that share them."""
        return trainer.global_rank % self.size == 0


def sums(metrics: Mapping[str, Metric]) -> dict[str, dict[str, Tensor]]:
    """The states of metrics, joined over all devices, on the CPU; every process calls."""
    found: dict[str, dict[str, Any]] = {}
    for name, metric in metrics.items():
        with metric.sync_context():
            found[name] = {key: value.detach().cpu().clone() for key, value in metric.metric_state.items()}
    return found


def restore(metrics: Mapping[str, Metric], kept: Mapping[str, Mapping[str, Tensor]], *, first: bool) -> None:
    """Puts joined states back: on the first process, so that each sample counts once; the others start from nothing."""
    for name, metric in metrics.items():
        metric.reset()
        for key, value in (kept.get(name, {}) if first else {}).items():
            setattr(metric, key, value.to(getattr(metric, key)))
