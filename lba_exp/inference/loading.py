"""A trained model from where it was left: a run folder, one of its checkpoints, or a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from lba_exp import composing, registry
from lba_exp.callbacks.checkpoints import BEST, load_checkpoint
from lba_exp.config import run_schema
from lba_exp.errors import ConfigError, WeightsError
from lba_exp.models.pretrained import CONFIG, MODEL_CONFIG, WEIGHTS, create, from_pretrained, load_weights


@dataclass
class Trained:
    """A model, and what was kept beside it of the data that it was trained on.

    Attributes:
        path: what it was read from.
        model: on the CPU, in evaluation mode.
        settings: the run's whole configuration; None for a model folder.
        kept: what the run's data module wrote to the checkpoint: means, classes, the vocabulary's hash; empty for a model folder.
    """

    path: Path
    model: nn.Module
    settings: DictConfig | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)


def read(source: str | Path) -> Trained:
    """The model in a run folder (its best checkpoint), in a checkpoint, or in a folder that ``save_pretrained`` wrote.

    Raises:
        lba_exp.errors.UserError: nothing there, a file that cannot be read, or weights that do not fit their own configuration.
    """
    path = Path(source).expanduser()
    if path.name == WEIGHTS:
        path = path.parent
    if not path.exists():
        raise WeightsError(f"{source} does not exist: give a run folder, a checkpoint (.ckpt), or a model folder.")
    if path.is_file():
        return _of_checkpoint(path)
    if (path / CONFIG).is_file() or (path / WEIGHTS).is_file():
        return Trained(path, from_pretrained(path))
    if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        return _of_checkpoint(path / "checkpoints" / BEST)
    raise WeightsError(f"{source} holds no model: expected a run's checkpoints/{BEST}, or {CONFIG} and {WEIGHTS}.")


def _of_checkpoint(path: Path) -> Trained:
    content = load_checkpoint(path)
    config, chosen = content.get(MODEL_CONFIG), content.get("hyper_parameters")
    if not isinstance(config, Mapping) or not isinstance(chosen, Mapping):
        raise WeightsError(f"{path} does not say what model it holds: it was written by an older version, or is no checkpoint of a run.")
    settings = _settings(chosen, path)
    composing.import_plugins(settings.plugins)
    try:
        model = create(config)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise WeightsError(f"the model of {path} cannot be built ({reason}): it was written by another version.") from None
    state = content["state_dict"]
    load_weights(model, {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}, str(path))
    kind = settings.data.kind
    kept = content.get(registry.DATA[kind].__qualname__) if kind in registry.DATA else None
    return Trained(path, model.eval(), settings, kept if isinstance(kept, Mapping) else {})


def _settings(chosen: Mapping[str, Any], path: Path) -> DictConfig:
    """A run's configuration, the trainer left out; raises ConfigError for keys that this version does not have."""
    stored = OmegaConf.create(dict(chosen))
    stored.resume, stored.init_from = "auto", None  # where the weights once came from need not be there any more
    stored.pop("trainer", None)  # nothing is trained, and Lightning may be another one
    try:
        return OmegaConf.merge(OmegaConf.structured(run_schema()), OmegaConf.to_container(stored, resolve=True))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"the configuration in {path} is not one of this version's ({reason}).") from None


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name; "auto": a GPU where there is one. ConfigError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: give auto, cpu, cuda, or cuda:1.") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name}: give auto, cpu, cuda, or cuda:1.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name} is not on this machine, which has {torch.cuda.device_count()} GPUs: give cpu, or auto.")
    return device
