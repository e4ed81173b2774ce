"""What a type alone cannot say: bounds, names, and settings that must fit together. No torch in here."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lba_exp import registry
from lba_exp.config import TRAINER_OWNED, MixerSchema, run_schema
from lba_exp.config_parts import AugmentationSchema
from lba_exp.data.sources import check_source, vocabulary_file
from lba_exp.errors import ConfigError
from lba_exp.messages import as_typed, bounds_words, unknown
from lba_exp.nn.conflicts import linear_conflict, softmax_conflict

PRECISIONS = (
    "16-true",
    "16-mixed",
    "bf16-true",
    "bf16-mixed",
    "32-true",
    "64-true",
    "16",
    "bf16",
    "32",
    "64",
    "transformer-engine",
    "transformer-engine-float16",
)
ONE_PROCESS = ("spawn", "fork", "notebook")  # in names of strategies whose processes hand nothing back that a record is made from
NATURAL = ("max_epochs", "min_epochs", "min_steps", "accumulate_grad_batches", "num_nodes", "log_every_n_steps", "check_val_every_n_epoch")


def check_reserved(key: str, where: str = "") -> None:
    """Raises ConfigError for a Trainer argument that another part of the run owns; ``where`` is added to the key in the message."""
    owner, _, name = key.partition(".")
    if owner == "trainer" and name in TRAINER_OWNED:
        raise ConfigError(f"{key}{where} is not set here: {TRAINER_OWNED[name]}.")


def check(cfg: DictConfig) -> None:
    """Checks a typed configuration; raises ConfigError (DataError for a missing folder) with one sentence at the first mistake."""
    _check_bounds(cfg, run_schema(), "")
    model, mixer = cfg.model, cfg.model.mixer
    if model.width % model.heads:
        near = [h for h in range(1, model.width + 1) if model.width % h == 0]
        raise ConfigError(
            f"model.heads={model.heads} does not divide model.width={model.width}: "
            f"choose one of {', '.join(map(str, near))} heads, or another width."
        )
    _check_mixer(mixer)
    if len(cfg.optim.betas) != 2 or not all(0 <= b < 1 for b in cfg.optim.betas):
        raise ConfigError(f"optim.betas={list(cfg.optim.betas)} does not fit: give two numbers in [0, 1).")
    _check_fit(cfg)
    if cfg.optim.ema_decay is not None:
        _check_averaging(cfg)
    _check_trainer(cfg.trainer)
    if cfg.sequence_parallel_size > 1:
        _check_sequence_parallel(cfg)
    if cfg.compile == "graphs":
        _check_graphs(cfg)
    if cfg.trainer.strategy == "fsdp2" and cfg.data.eval_batch_size == 1:
        raise ConfigError("data.eval_batch_size=1 does not fit trainer=fsdp, whose devices run as many batches each: give 2 or more.")
    if cfg.resume not in ("auto", "never") and not Path(cfg.resume).expanduser().is_file():
        raise ConfigError(f"resume={cfg.resume} is no file: give auto, never, or the path of a checkpoint.")
    if cfg.init_from is not None:
        weights_file(Path(cfg.init_from).expanduser())
    check_source(cfg.data.source)


def _check_fit(cfg: DictConfig) -> None:
    """Model, data and task of this package that do not go together; those of plugins are left to whoever wrote them."""
    model, data = cfg.model.kind, cfg.data
    if data.kind == "pixel_sequences":
        layout = {"vit": "image", "sequence_classifier": "pixels"}.get(model, data.layout)
        if data.layout != layout:
            raise ConfigError(f"model.kind={model} does not take data.layout={data.layout}: give data.layout={layout}.")
        if model in ("two_towers", "masked_lm", "text_classifier", "causal_lm"):
            raise ConfigError(f"model.kind={model} does not read images (data.kind={data.kind}): give data=text, or a model of images.")
    if data.kind == "image_classification":
        if model in registry.MODELS.builtin and model != "vit":
            raise ConfigError(
                f"model.kind={model} does not read whole images (data.kind={data.kind}): give size=vit_tiny, vit_small or vit_base, "
                "or data=images for sequences of pixels."
            )
        _check_images(cfg)
    elif data.kind in registry.DATA.builtin:
        for key, default in vars(AugmentationSchema()).items():
            if cfg.augmentation[key] != default:
                raise ConfigError(
                    f"augmentation.{key}={cfg.augmentation[key]} is for data.kind=image_classification, not for {data.kind}: "
                    "give augmentation=none, or data=image_folder."
                )
    if data.kind == "token_sequences" and model in ("vit", "two_towers", "masked_lm", "causal_lm"):
        raise ConfigError(f"model.kind={model} does not read single sequences with a class (data={data.name}): give sequence_classifier.")
    if data.kind in ("text_blocks", "text_stream"):
        objective = {"masked_lm": "masked", "causal_lm": "causal"}.get(model)
        if objective is None and model in registry.MODELS.builtin:
            raise ConfigError(f"model.kind={model} is no language model, which data.kind={data.kind} needs: give masked_lm or causal_lm.")
        if objective is not None and data.objective != objective:
            raise ConfigError(f"model.kind={model} does not go with data.objective={data.objective}: give data.objective={objective}.")
        _check_vocabulary(data)
    if data.kind == "text_stream":
        _check_stream(cfg)
    if data.kind == "text_classification":
        _check_text(cfg)
    elif cfg.checkpoint.monitor == "val/score" and data.kind in registry.DATA.builtin:
        raise ConfigError(f"checkpoint.monitor=val/score is for texts with labels, not for data.kind={data.kind}: give val/accuracy.")
    _check_first_token(cfg.model)
    task = "language_modelling" if data.kind in ("text_blocks", "text_stream") else "classification"
    if data.kind in registry.DATA.builtin and cfg.task in registry.TASKS.builtin and cfg.task != task:
        raise ConfigError(f"task={cfg.task} does not go with data.kind={data.kind}: give task={task}.")


def _check_images(cfg: DictConfig) -> None:
    """What whole images and their augmentation need, beyond the bounds of each number."""
    augmentation, data = cfg.augmentation, cfg.data
    for key, low, high in (("crop_scale", 0, 1), ("crop_ratio", 0, math.inf)):
        pair = list(augmentation[key])
        if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
            within = ", at most 1" if high == 1 else ""
            raise ConfigError(f"augmentation.{key}={pair} does not fit: give two numbers above 0{within}, the smaller first.")
    for key in ("channel_mean", "channel_deviation"):
        if data[key] is not None and not all(0 <= value <= 1 for value in data[key]):
            raise ConfigError(f"data.{key}={list(data[key])} does not fit: give numbers from 0 to 1, as for pixels of 0 to 1.")
    if data.channel_deviation is not None and min(data.channel_deviation, default=1) <= 0:
        raise ConfigError(f"data.channel_deviation={list(data.channel_deviation)} does not fit: pixels are divided by it.")
    if (augmentation.mixup or augmentation.cutmix) and cfg.sequence_parallel_size > 1:
        raise ConfigError(
            f"augmentation.mixup and cutmix do not go with sequence_parallel_size={cfg.sequence_parallel_size}, whose devices would mix "
            "parts of one image in different ways: give 0 for both, or 1."
        )


def _check_averaging(cfg: DictConfig) -> None:
    """The moving average is of weights that are whole on every device."""
    given, size = f"optim.ema_decay={cfg.optim.ema_decay}", cfg.sequence_parallel_size
    if size > 1:
        raise ConfigError(f"{given} does not go with sequence_parallel_size={size}: give 1, or optim.ema_decay=null.")
    if cfg.trainer.strategy == "fsdp2":
        raise ConfigError(f"{given} does not go with trainer=fsdp, which shards the weights: give trainer=ddp, or optim.ema_decay=null.")


def _check_stream(cfg: DictConfig) -> None:
    """A stream has no end, and nothing to come back to."""
    trainer = cfg.trainer
    if trainer.max_epochs not in (None, -1) or trainer.max_steps < 1:
        raise ConfigError("data.kind=text_stream has no end that a run could reach: give trainer.max_epochs=-1 trainer.max_steps=N.")
    if trainer.overfit_batches:
        raise ConfigError("trainer.overfit_batches does not go with data.kind=text_stream, which gives no batch twice: give data=text.")
    if cfg.optim.warmup_epochs is not None:
        raise ConfigError("optim.warmup_epochs means nothing to data.kind=text_stream, which has no epochs: give optim.warmup_fraction.")


def _check_vocabulary(data: DictConfig) -> None:
    """One vocabulary, or the size of one to train, or none for bytes."""
    given = [f"data.{key}={data[key]}" for key in ("vocabulary", "vocabulary_size") if data[key] is not None]
    if data.tokens == "bytes" and given:
        raise ConfigError(f"{given[0]} means nothing to data.tokens=bytes: leave it out.")
    if len(given) == 2:
        raise ConfigError(f"{given[0]} is given, and {given[1]} of one to train: leave one of them out.")
    if data.tokens != "bytes" and data.vocabulary_size is None:
        vocabulary_file(data.vocabulary)


def _check_text(cfg: DictConfig) -> None:
    """What a model of texts with labels needs."""
    data, kind = cfg.data, cfg.model.kind
    if kind in registry.MODELS.builtin and kind not in ("text_classifier", "sequence_classifier", "two_towers"):
        raise ConfigError(
            f"model.kind={kind} gives a text no label, which data.kind=text_classification needs: give text_classifier (from the first "
            "token, as BERT does), sequence_classifier (from the mean over all tokens) or two_towers (of pairs, each text by itself)."
        )
    if kind == "two_towers" and data.second_text_column is None:
        raise ConfigError("model.kind=two_towers reads pairs of texts: name the second one's column (data.second_text_column).")
    _check_vocabulary(data)
    valid = ("pearson", "spearman") if data.target == "number" else ("accuracy", "f1", "matthews")
    for metric in data.metrics:
        if metric not in valid:
            raise ConfigError(f"data.metrics={list(data.metrics)}: {unknown(metric, valid, f'a metric of data.target={data.target}')}")
    if data.target == "number":
        for key, value, remedy in (
            ("checkpoint.monitor", cfg.checkpoint.monitor, "val/score") if cfg.checkpoint.monitor == "val/accuracy" else ("", None, ""),
            ("optim.label_smoothing", cfg.optim.label_smoothing or None, "0"),
            ("efficiency.target_accuracy", cfg.efficiency.target_accuracy, "null"),
        ):
            if value is not None:
                raise ConfigError(f"{key}={value} does not go with data.target=number, which has no accuracy: give {key}={remedy}.")


def weights_file(path: Path) -> Path:
    """The file of weights that ``init_from`` names: itself, or the best checkpoint of a run folder, or the weights of a model folder.

    Raises:
        ConfigError: there is none.
    """
    if path.is_dir():
        files = [path / "checkpoints" / "best.ckpt", path / "model.safetensors"]
        if found := [file for file in files if file.is_file()]:
            return found[0]
        raise ConfigError(f"init_from={path} holds neither checkpoints/best.ckpt nor model.safetensors: give a run or a model folder.")
    if not path.is_file():
        raise ConfigError(f"init_from={path} is no file: give the path of a checkpoint, a run folder, or a model folder.")
    return path


def _check_first_token(model: DictConfig) -> None:
    """Raises ConfigError where the class is read from a first token that no mixer lets see another one."""
    direction, remedy = model.mixer.direction, ", or give model.pooling=mean or mean_all"
    what = f"model.pooling={model.pooling}" if model.pooling == "class_token" else None
    if model.kind == "text_classifier":
        what, remedy = "model.kind=text_classifier", ""
    blind = direction == "forward" or (direction == "alternating" and model.depth == 1)
    if what is not None and blind and model.mixer.kind in registry.MIXERS.builtin:
        raise ConfigError(
            f"{what} reads the first token alone, which model.mixer.direction={direction} keeps from seeing any other: "
            f"choose another direction{remedy}."
        )


def _check_mixer(mixer: DictConfig) -> None:
    if mixer.options and mixer.kind in ("linear", "softmax"):
        raise ConfigError(
            f"model.mixer.options is for mixers with settings of their own; {mixer.kind!r} takes none: {', '.join(mixer.options)}."
        )
    settings, conflict = dict(mixer), None
    if mixer.kind == "linear":
        conflict = linear_conflict(settings)
    elif mixer.kind == "softmax":
        conflict = softmax_conflict(settings, vars(MixerSchema()))
    if conflict:
        raise ConfigError(f"model.mixer.{conflict}.")


def _check_sequence_parallel(cfg: DictConfig) -> None:
    what, mixer, strategy = f"sequence_parallel_size={cfg.sequence_parallel_size}", cfg.model.mixer, str(cfg.trainer.strategy)
    if mixer.kind == "softmax":
        raise ConfigError(f"{what} does not go with softmax attention (model={cfg.model.name}): give a model of linear attention, or 1.")
    if mixer.kind == "linear" and mixer.scan != "raster":
        raise ConfigError(f"{what} does not go with model.mixer.scan={mixer.scan}, which reads tokens in another order: give raster, or 1.")
    if cfg.compile:
        given = f"compile={as_typed(cfg.compile)}"
        raise ConfigError(f"{what} does not go with {given}, which does not compile what devices send each other: give compile=false.")
    if cfg.parity.mode == "strict":
        raise ConfigError(f"{what} does not go with parity=strict, as no device has a whole sequence to compare on: give parity=check.")
    if not (strategy in ("auto", "fsdp2") or strategy.startswith("ddp")):
        raise ConfigError(f"{what} does not go with trainer.strategy={strategy}: give trainer=ddp or trainer=fsdp.")


def _check_graphs(cfg: DictConfig) -> None:
    """A CUDA graph finds its weights where they were when it was recorded."""
    strategy = str(cfg.trainer.strategy)
    if strategy == "fsdp2":
        raise ConfigError(
            "compile=graphs does not go with trainer=fsdp, which gathers weights in other places at every step: give compile=true, or "
            "trainer=ddp."
        )
    if not (strategy == "auto" or strategy.startswith("ddp")):
        raise ConfigError(f"compile=graphs does not go with trainer.strategy={strategy}: give trainer=ddp, or compile=true.")


def _check_trainer(trainer: DictConfig) -> None:
    if trainer.precision is not None and str(trainer.precision) not in PRECISIONS:
        raise ConfigError(f"trainer.precision={trainer.precision}: {unknown(str(trainer.precision), PRECISIONS, 'a precision')}")
    strategy = str(trainer.strategy)
    if strategy.startswith("fsdp") and strategy != "fsdp2":
        raise ConfigError(f"trainer.strategy={strategy}: the older FSDP is not for this; give trainer=fsdp, which is FSDP2.")
    if any(word in strategy for word in ONE_PROCESS):
        raise ConfigError(f"trainer.strategy={strategy} has no run record: give trainer=ddp or trainer=fsdp, from a command or a script.")
    for name in NATURAL:
        value = trainer.get(name)
        if isinstance(value, int) and value < 1 and not (name == "max_epochs" and value == -1):
            raise ConfigError(f"trainer.{name}={value} does not fit: give an integer >= 1.")
    if trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
        raise ConfigError("trainer.max_epochs and trainer.max_steps are both open: the learning rate needs an end, so give one of them.")


def _check_bounds(cfg: Any, schema: Any, prefix: str) -> None:
    for member in fields(schema):
        key, value, default = prefix + member.name, cfg[member.name], getattr(schema, member.name)
        if is_dataclass(default):
            _check_bounds(value, default, key + ".")
            continue
        bounds = member.metadata
        if value is None or not bounds:
            continue
        names = bounds["names"].names if isinstance(bounds.get("names"), registry.Registry) else bounds.get("choices")
        if names is not None and value not in names:
            raise ConfigError(f"{key}={value}: {unknown(str(value), names, f'valid for {key}')}")
        wrong = isinstance(value, float) and not math.isfinite(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            wrong |= (
                value < bounds.get("low", value) or value > bounds.get("high", value) or ("above" in bounds and value <= bounds["above"])
            )
        if wrong:
            raise ConfigError(f"{key}={value} is out of range: give a value{bounds_words(bounds)} ({bounds['about']}).")
