"""What a task does so that it is the same on any number of devices: losses weighed, sums joined, weights sharded where that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torchmetrics import Metric

from lba_exp.devices.sharding import shard


def batch_weight(trainer: pl.Trainer, batch_idx: int) -> float:
    """What the mean loss of a training batch is multiplied by, so that an optimizer step has the mean over its samples: 1 for full batches.

    The last batches of an epoch may have other sizes from device to device (``EpochOrder.weight``); 1 for loaders without an order.
    """
    order = getattr(trainer.train_dataloader, "order", None)
    if order is None or not order.equal_shards:
        return 1.0
    return order.weight(batch_idx, trainer.accumulate_grad_batches, int(trainer.num_training_batches))


def shard_where_wanted(module: pl.LightningModule) -> None:
    """Shards ``module.model`` under FSDP2; call it in ``configure_model``."""
    strategy = module.trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        shard(module.model, strategy.device_mesh["data_parallel"])


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
