"""The training times that the paper tells, at its three sizes, as settings of ``lba-bench steps``: checked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from lba_exp.bench import step_settings
from lba_exp.bench.settings import words
from lba_exp.bench.step_settings import StepSettings, split
from lba_exp.errors import ConfigError
from lba_exp.results.paper import read_paper

FIRST = "softmax"
# Hydra and Vim are twice as wide inside: a smaller MLP gives them the parameters of the others
MODELS = (
    *(FIRST, "lion_lit", "lion_d", "lion_d_multiscan", "lion_s", "lion_s_multiscan"),
    *("hydra model.mlp_ratio=3", "vim model.mlp_ratio=3"),
)
TABLES = {"vit_tiny": "imagenet_tiny", "vit_small": "imagenet_small", "vit_base": "imagenet_base"}  # of lba_exp/results/paper.yaml


def read(options: Mapping[str, Any]) -> dict[str, StepSettings]:
    """Size (an entry of conf/size) -> its settings; raises ConfigError for a value that does not fit."""
    texts = list(options["models"])
    if all("=" in text.partition(" ")[0] for text in texts):
        texts = [*MODELS, *texts]
    settings = step_settings.read(dict(options) | {"models": texts, "profile": False})
    if split(settings.models[0])[0] != FIRST:
        raise ConfigError(
            f"{settings.models[0]!r} comes first, and the paper's times are relative to softmax attention: name {FIRST} first."
        )
    for override in (word for text in (*settings.models, *settings.overrides) for word in split(text)):
        if override.startswith("size="):
            raise ConfigError(f"{override}: the sizes to measure are those of --sizes.")
    return {size: replace(settings, overrides=(f"size={size}", *settings.overrides)) for size in words("sizes", options["sizes"])}


def configurations(sizes: Mapping[str, StepSettings]) -> dict[str, dict[str, DictConfig]]:
    """Size -> text of a model -> its configuration; errors as of ``step_settings.configurations``."""
    return {size: step_settings.configurations(settings) for size, settings in sizes.items()}


def paper_time(size: str, model: str) -> float | None:
    """The paper's training time over that of softmax attention; None where it tells none."""
    if size not in TABLES:
        return None
    found = read_paper(f"{TABLES[size]}:time").number([split(model)[0]], [])
    return None if found is None else found[0]
