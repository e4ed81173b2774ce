"""Models from plain configurations, and folders that hold one with its weights: config.json and model.safetensors."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn

from lba_exp import registry
from lba_exp.errors import WeightsError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_CONFIG = "model_config"  # where a run's checkpoints keep a model's configuration


def create(config: Mapping[str, Any]) -> nn.Module:
    """The model of a configuration, freshly initialised; the configuration stays with it as ``model.config``.

    Args:
        config: plain types: ``kind`` (a name in ``lba_exp.registry.MODELS``), ``heads``, ``mixer`` (``kind``, a name in
            ``lba_exp.registry.MIXERS``, and the mixer's keyword arguments; or a list of one for each layer), and the model's keyword
            arguments, ``width`` and ``depth`` among them.

    Raises:
        lba_exp.errors.ConfigError: for a name that is not registered. TypeError, ValueError: for arguments that do not fit.
    """
    kept = copy.deepcopy(dict(config))
    arguments = dict(kept)
    kind, heads, mixers = (arguments.pop(key) for key in ("kind", "heads", "mixer"))

    def make_mixer(layer: int) -> nn.Module:
        settings = dict(mixers[layer] if isinstance(mixers, list) else mixers)
        return registry.MIXERS[settings.pop("kind")](arguments["width"], heads, **settings)

    model = registry.MODELS[kind](make_mixer=make_mixer, **arguments)
    model.config = kept
    return model


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Writes a model that ``create`` (or a run, or a conversion) has built to a folder, which is made where there is none.

    Raises:
        lba_exp.errors.WeightsError: the model has no configuration, or the folder holds a model already.
    """
    from safetensors.torch import save_file

    if getattr(model, "config", None) is None:
        raise WeightsError("this model was built without a configuration: build it with lba_exp.models.pretrained.create.")
    folder = Path(folder)
    if (folder / CONFIG).exists() or (folder / WEIGHTS).exists():
        raise WeightsError(f"{folder} holds a model already: give another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{WEIGHTS}.partial"
        save_file({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, partial, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(model.config, indent=2) + "\n", "utf-8")
        os.replace(partial, folder / WEIGHTS)
    except OSError as error:
        raise WeightsError(f"{folder} cannot be written ({error.strerror or error}).") from None


def from_pretrained(folder: str | Path) -> nn.Module:
    """The model that ``save_pretrained`` wrote to a folder, on the CPU, in evaluation mode and in the dtype of its weights.

    Raises:
        lba_exp.errors.WeightsError: no such folder, no model in it, or weights that do not fit its configuration.
        lba_exp.errors.ConfigError: a name in its configuration that is not registered (a plugin's: import it first).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise WeightsError(f"{folder} holds no {name}: give a folder that save_pretrained wrote.")
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        if not isinstance(config, dict) or not {"kind", "heads", "mixer"} <= config.keys():
            raise WeightsError(f"{folder / CONFIG} has no kind, heads and mixer: it is no configuration of this package.")
        model = create(config)
        weights = load_file(folder / WEIGHTS)
    except WeightsError:
        raise
    except (KeyError, IndexError) as error:
        lacking = error if isinstance(error, KeyError) else "a mixer for each layer"
        raise WeightsError(f"{folder / CONFIG} lacks {lacking}.") from None
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be read: {str(error).splitlines()[0].rstrip('.')}.") from None
    load_weights(model, weights, str(folder / WEIGHTS))
    return model.eval()


def load_weights(model: nn.Module, weights: Mapping[str, Any], where: str) -> None:
    """Copies weights into a model, which takes their dtype; WeightsError where a name is missing or unknown, or a shape differs."""
    own = model.state_dict()
    if missing := [name for name in own if name not in weights]:
        raise WeightsError(f"{where} lacks {some(missing)}.")
    if unknown := [name for name in weights if name not in own]:
        raise WeightsError(f"{where} holds {some(unknown)}, which this model has not.")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise WeightsError(f"{name} of {where} has the shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}.")
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(dict(weights))


def some(names: list[str]) -> str:
    """At most three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Pretrained:
    """Gives a model ``save_pretrained(folder)`` and ``from_pretrained(folder)``, see the functions of these names."""

    config: dict[str, Any] | None = None

    def save_pretrained(self, folder: str | Path) -> None:
        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """As the function; WeightsError where the folder holds a model of another class."""
        model = from_pretrained(folder)
        if not isinstance(model, cls):
            raise WeightsError(f"{folder} holds a {type(model).__name__}, not a {cls.__name__}.")
        return model
