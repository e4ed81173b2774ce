"""The one place where names become objects."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from lba_exp import registry, tracking
from lba_exp.callbacks.averaging import MovingAverage
from lba_exp.callbacks.checkpoints import AtomicCheckpointIO, checkpoint_callbacks
from lba_exp.callbacks.decays import Decays
from lba_exp.callbacks.divergence import Divergence
from lba_exp.callbacks.efficiency import Efficiency
from lba_exp.callbacks.parity import Parity
from lba_exp.callbacks.preemption import Preemption
from lba_exp.callbacks.recorder import Recorder
from lba_exp.callbacks.resplitting import Resplitting
from lba_exp.callbacks.samples import Samples
from lba_exp.config import DataSchema, MixerSchema, ModelSchema
from lba_exp.data.spec import DataSpec
from lba_exp.devices import fsdp  # noqa: F401 (makes the strategy known to Lightning by its name)
from lba_exp.devices.signals import Requests
from lba_exp.errors import ConfigError
from lba_exp.models.pretrained import create
from lba_exp.models.vision import patch_grid
from lba_exp.nn.blocks import MixerStack
from lba_exp.nn.mixer import OperatorMixer
from lba_exp.results import naming
from lba_exp.results.metrics_log import MetricsLog


def data_module(cfg: DictConfig) -> pl.LightningDataModule:
    """The data module of a configuration, ready to use (``setup`` done); raises DataError."""
    settings = OmegaConf.to_container(cfg.data)
    settings.pop("global_batch_size")  # a matter of the number of devices, see ``batch_size``
    constructor = registry.DATA[settings.pop("kind")]
    settings = fitting(constructor, settings, DataSchema(), "data") | {"name": naming.data_name(cfg), "seed": cfg.seed}
    if "augmentation" in inspect.signature(constructor).parameters:
        settings["augmentation"] = OmegaConf.to_container(cfg.augmentation)
    if "token_types" in inspect.signature(constructor).parameters:
        forward = getattr(registry.MODELS[cfg.model.kind], "forward", None)  # a plugin's may be a function
        settings["token_types"] = forward is not None and "token_types" in inspect.signature(forward).parameters
    if "apart" in inspect.signature(constructor).parameters:
        settings["apart"] = getattr(registry.MODELS[cfg.model.kind], "token_dimension", 1) == 2  # its inputs are pairs of sequences
    module = constructor(**settings)
    module.setup(None)
    return module


def fitting(constructor: Callable, settings: dict[str, Any], schema: Any, group: str) -> dict[str, Any]:
    """The settings that a constructor takes; ConfigError for one that is set, away from its default, and that it does not take."""
    parameters = inspect.signature(constructor).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return settings
    for key, value in settings.items():
        if key not in parameters and key not in ("name", "source") and value != getattr(schema, key):
            taken = ", ".join(name for name in parameters if hasattr(schema, name))
            raise ConfigError(f"{group}.{key}={value} means nothing to {constructor.__name__}: it takes {taken}.")
    return {key: value for key, value in settings.items() if key in parameters}


def mixer(cfg: DictConfig, layer: int, grid: tuple[int, int] | None = None) -> dict[str, Any]:
    """Kind and keyword arguments of one token mixer; ``grid``: (height, width) of its tokens, where they are those of an image."""
    settings = OmegaConf.to_container(cfg.mixer)
    options, kind = settings.pop("options"), settings.pop("kind")
    constructor = registry.MIXERS[kind]
    taken = inspect.signature(constructor).parameters
    if kind == "linear":
        options = settings
        if settings["scan"] != "raster":
            if grid is None:
                raise ConfigError(f"model.mixer.scan={settings['scan']} reads a grid's tokens, and these data have none: use scan=raster.")
            options |= {"grid": list(grid), "class_token": cfg.pooling != "mean"}
    elif kind == "softmax":
        options = {"feature_map": settings["feature_map"], "direction": settings["direction"]}
    else:
        named = fitting(constructor, settings, MixerSchema(), "model.mixer")
        options = {key: value for key, value in named.items() if key in taken} | options
    if "layer" in taken and options.get("direction") == "alternating":
        options["layer"] = layer
    try:
        inspect.signature(constructor).bind(cfg.width, cfg.heads, **options)
    except TypeError as error:
        raise ConfigError(
            f"model.mixer.options does not fit the mixer {kind!r} ({error}); it takes {inspect.signature(constructor)}."
        ) from None
    return {"kind": kind, **options}


def model(cfg: DictConfig, spec: DataSpec) -> nn.Module:
    """The model of a configuration (``cfg.model``) for data of a given shape."""
    settings = OmegaConf.to_container(cfg)
    for key in ("name", "kind", "mixer", "heads"):
        settings.pop(key)
    if settings["norm_position"] is None:  # the model's own
        settings.pop("norm_position")
    constructor = registry.MODELS[cfg.kind]
    settings = fitting(constructor, settings, ModelSchema(), "model")
    shape = {"classes": spec.classes, "channels": spec.channels, "vocabulary": spec.vocabulary, "length": spec.length}
    if spec.grid is not None:
        shape["image_size"] = list(spec.grid)
    parameters = inspect.signature(constructor).parameters
    if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        shape = {key: value for key, value in shape.items() if key in parameters}
    try:
        grid = patch_grid(spec.grid, cfg.patch_size) if "patch_size" in settings else spec.grid
        mixers = [mixer(cfg, layer, grid) for layer in range(cfg.depth)]
        if all(other == mixers[0] for other in mixers):
            mixers = mixers[0]
        return create({"kind": cfg.kind, "heads": cfg.heads, **shape, **settings, "mixer": mixers})
    except ValueError as error:
        raise ConfigError(f"model: {str(error).rstrip('.')}.") from None


def task(cfg: DictConfig, spec: DataSpec) -> pl.LightningModule:
    """Model, loss, metrics and optimizer of a run; the weights are a function of the seed."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    plain = OmegaConf.to_container(cfg, resolve=True)
    constructor = registry.TASKS[cfg.task]
    judged = {"metrics": spec.metrics, "monitor": cfg.checkpoint.monitor}
    taken = inspect.signature(constructor).parameters  # a task of a plugin may be judged in its own way
    mixed = {key: plain["augmentation"][key] for key in ("mixup", "cutmix", "mix_probability", "cutmix_share")}
    judged["mixing"] = mixed if mixed["mixup"] or mixed["cutmix"] else None
    if judged["mixing"] and "mixing" not in taken:
        raise ConfigError(f"augmentation.mixup and cutmix are not done by task={cfg.task}: give 0 for both.")
    judged = {key: value for key, value in judged.items() if key in taken}
    built = constructor(model(cfg.model, spec), classes=spec.classes, optim=plain["optim"], seed=cfg.seed, hyper_parameters=plain, **judged)
    if cfg.compile == "graphs":
        built.compile_model(graphs=True)
    elif cfg.compile:
        built.compile_model()
    if cfg.sequence_parallel_size > 1:
        if not isinstance(built.model, MixerStack) or not hasattr(built, "split_sequences"):
            raise ConfigError(
                f"sequence_parallel_size={cfg.sequence_parallel_size} does not go with model.kind={cfg.model.kind} and task={cfg.task}: "
                "give a model and a task of this package, or made from one, or 1."
            )
        built.split_sequences(cfg.sequence_parallel_size)
    return built


def loggers(cfg: DictConfig, folder: Path) -> list:
    """metrics.csv, and the W&B run where one is wanted: one a job, whatever the number of devices."""
    found: list = [MetricsLog(folder)]
    if cfg.logger.wandb != "off" and pl.utilities.rank_zero_only.rank == 0:
        found.append(WandbLogger(experiment=tracking.begin(cfg, folder)))
    return found


class Parts:
    """The callbacks of a run that its record is made from.

    Args:
        folder: the run's.
        requests: what asks the run to end.
    """

    def __init__(self, cfg: DictConfig, folder: Path, requests: Requests, console: Console):
        p = cfg.parity
        self.parity = None
        if p.mode != "off":
            self.parity = Parity(
                p.mode, p.tolerance, p.operator_tolerance, full=p.full, full_test=p.full_test, memory_budget_gib=p.memory_budget_gib
            )
        self.efficiency = Efficiency(cfg.efficiency.target_accuracy)
        self.preemption = Preemption(requests, folder / "checkpoints" if keeps_checkpoints(cfg) else None)
        self.decays = Decays()
        self.samples = Samples()
        self.average = None if cfg.optim.ema_decay is None else MovingAverage(cfg.optim.ema_decay)
        self.recorder = Recorder(tuple(c for c in (self.parity, self.efficiency) if c is not None), console)

    def callbacks(self) -> list[pl.Callback]:
        # the average before what saves the step after which a run was asked to end: that step is part of it
        found = (self.efficiency, Divergence(), self.parity, self.decays, self.samples, self.recorder, self.average, self.preemption)
        return [c for c in (*found, Resplitting()) if c is not None]


def keeps_checkpoints(cfg: DictConfig) -> bool:
    """Whether a run writes checkpoints: not in ``fast_dev_run``, nor where ``trainer.enable_checkpointing`` is false."""
    return cfg.trainer.enable_checkpointing is not False and not cfg.trainer.fast_dev_run


def trainer(cfg: DictConfig, folder: Path, parts: Parts, logs: list) -> pl.Trainer:
    """Lightning's Trainer; what it refuses becomes one sentence."""
    settings = OmegaConf.to_container(cfg.trainer)
    if settings["enable_model_summary"] is None:
        settings["enable_model_summary"] = False
    if settings["enable_progress_bar"] is None:
        settings["enable_progress_bar"] = sys.stderr.isatty()
    if cfg.compile == "graphs":
        settings["inference_mode"] = False  # CUDA graphs recorded in it leave torch with tensors that training must not write to
    callbacks = parts.callbacks() + ([RichProgressBar(leave=False)] if settings["enable_progress_bar"] else [])
    if keeps_checkpoints(cfg):
        callbacks += checkpoint_callbacks(folder, cfg.checkpoint)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what it remarks while it is built, the record says
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            return pl.Trainer(**settings, logger=logs, callbacks=callbacks, default_root_dir=folder, plugins=[AtomicCheckpointIO()])
    except Exception as error:  # whatever Lightning raises here is about the arguments
        raise ConfigError(f"trainer: {str(error).splitlines()[0].rstrip('.')}.") from None


def replicas(cfg: DictConfig, trainer: pl.Trainer) -> int:
    """Devices that get batches of their own; ConfigError where those that share sequences do not make up all devices."""
    shared = cfg.sequence_parallel_size
    if trainer.world_size % shared:
        raise ConfigError(
            f"sequence_parallel_size={shared} does not divide the number of devices, {trainer.world_size}: give trainer.devices={shared}, "
            "or another multiple of it."
        )
    return trainer.world_size // shared


def check_form(model: nn.Module, trainer: pl.Trainer) -> None:
    """Raises ConfigError where the run is to train in the fused form, which its device, its precision or a mixer does not have."""
    dtype = torch.float64 if str(trainer.precision).startswith("64") else torch.float32
    for mixer in model.modules():
        wanted = isinstance(mixer, OperatorMixer) and mixer.form == "fused"
        if wanted and (reason := mixer.fused_obstacle(trainer.strategy.root_device, dtype)):
            raise ConfigError(f"model.mixer.{reason}.")


def batch_size(cfg: DictConfig, trainer: pl.Trainer) -> int:
    """Sequences per batch on one device.

    Raises:
        ConfigError: ``data.global_batch_size`` is no multiple of what has to share it.
    """
    whole, accumulate = cfg.data.global_batch_size, trainer.accumulate_grad_batches
    if whole is None:
        return cfg.data.batch_size
    devices = replicas(cfg, trainer)
    pieces = devices * accumulate
    if whole % pieces:
        near = [n for n in (whole // pieces * pieces, (whole // pieces + 1) * pieces) if n > 0]
        batches = f" x {accumulate} batches a step (trainer.accumulate_grad_batches)" if accumulate > 1 else ""
        raise ConfigError(
            f"data.global_batch_size={whole} does not divide among {devices} devices{batches}: "
            f"give {' or '.join(map(str, near))}, or another number of devices."
        )
    return whole // pieces


def describe_environment(trainer: pl.Trainer) -> dict[str, Any]:
    """What a figure's reader must know of the machine: versions, device, threads; nothing that identifies a person."""
    import platform

    import torch

    import lba_exp

    device = trainer.strategy.root_device
    return {
        "lba_exp": lba_exp.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        "devices": trainer.world_size,
        "threads": torch.get_num_threads(),
        "precision": str(trainer.precision),
    }
