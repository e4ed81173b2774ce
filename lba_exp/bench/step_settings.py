"""What a benchmark of training steps measures, read from the command line and checked before torch is imported."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from lba_exp.bench.settings import DEVICES, one, positive, whole
from lba_exp.composing import compose
from lba_exp.errors import ConfigError
from lba_exp.registry import MIXERS

DTYPES = ("bfloat16", "float32")
COMPILES = ("model", "graphs", "blocks", "off")
# images are drawn; the data of a configuration are there to be complete
DATA = ("data=images", "data.layout=image", "data.source=digits")
SIZE = "size=vit_base"


@dataclass(frozen=True)
class StepSettings:
    """Models of images whose training steps take turns.

    Attributes:
        models: texts of a preset (an entry of conf/model) and overrides of its own; the first is what the others are compared to.
        overrides: of all models' configurations.
        form: form of the linear mixers, where a model's own overrides set none.
        resolution: height and width of the images in pixels.
        batch: images B a step.
        classes: number of classes.
        dtype: "float32", or "bfloat16": autocast over forward pass and loss, weights and optimizer in float32.
        compile: "model" (the whole model, for its one shape), "graphs" (as ``compile=graphs`` of a run: that, its kernels recorded once as
            CUDA graphs, so that the host launches a graph where it launched hundreds of kernels), "blocks" (as ``compile=true``) or "off".
        profile: one more step of each model under torch's profiler, after all turns.
        device, threads, repeats, seconds: as of ``lba_exp.bench.settings.Settings``.
    """

    models: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    form: str = "auto"
    resolution: int = 224
    batch: int = 128
    classes: int = 1000
    dtype: str = "bfloat16"
    compile: str = "model"
    profile: bool = False
    device: str = "auto"
    threads: int | None = None
    repeats: int = 5
    seconds: float = 10.0


def read(options: Mapping[str, Any]) -> StepSettings:
    """Settings from the command line's words; raises ConfigError for a value that does not fit."""
    models, overrides = named(options["models"])
    return StepSettings(
        models=models,
        overrides=overrides,
        form=options["form"],
        dtype=one("dtype", options["dtype"], DTYPES, "a dtype"),
        compile=one("compile", options["compile"], COMPILES, "what is compiled"),
        profile=options["profile"],
        device=one("device", options["device"], DEVICES, "a device"),
        threads=None if options["threads"] is None else whole("threads", options["threads"]),
        seconds=positive("seconds", options["seconds"]),
        **{name: whole(name, options[name]) for name in ("resolution", "batch", "classes", "repeats")},
    )


def named(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts that are models, and those that are overrides of all of them; raises ConfigError where no model is named, or one twice."""
    models, overrides = [], []
    for text in texts:
        words = split(text)
        if words:
            (overrides if "=" in words[0] else models).append(text)
    if not models:
        raise ConfigError('no model is named: give entries of conf/model, such as softmax lion_s "lion_s model.mixer.form=chunkwise".')
    if len(models) > len(set(models)):
        raise ConfigError(f"{next(m for m in models if models.count(m) > 1)!r} is named twice: give each model once.")
    return tuple(models), tuple(overrides)


def configurations(settings: StepSettings) -> dict[str, DictConfig]:
    """Text of a model -> its configuration; raises ConfigError for an unknown preset, form or override, or patches that do not fit."""
    found = {}
    for text in settings.models:
        preset, *own = split(text)
        base = [f"model={preset}", *DATA, *settings.overrides]
        if not any(override.startswith("size=") for override in (*settings.overrides, *own)):
            base.append(SIZE)
        cfg = compose([*base, *own])
        if cfg.model.mixer.kind in MIXERS.builtin - {"softmax"} and not any(override.startswith("model.mixer.form=") for override in own):
            cfg = compose([*base, *own, f"model.mixer.form={settings.form}"])
        check_patches("--resolution", settings.resolution, cfg)
        found[text] = cfg
    return found


def split(text: str) -> list[str]:
    """A model's preset, and its own overrides; raises ConfigError where quotes do not close."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is no model with its overrides: {error}.") from None


def check_patches(flag: str, resolution: int, cfg: DictConfig) -> None:
    """Raises ConfigError where a model's patches do not fit images of that height and width."""
    if resolution % cfg.model.patch_size:
        raise ConfigError(f"{flag} {resolution} is no multiple of model.patch_size={cfg.model.patch_size}.")
