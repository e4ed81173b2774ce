"""Weights in files: safetensors, and torch's own format without anything but tensors in it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lba_exp.convert.mlm import load_lion_mlm
from lba_exp.convert.published import to_published
from lba_exp.convert.vision import load_lion_vision
from lba_exp.errors import WeightsError
from lba_exp.models.pretrained import CONFIG, MODEL_CONFIG, WEIGHTS, create, from_pretrained, load_weights

FILES = (WEIGHTS, "pytorch_model.bin")  # what a folder of weights may hold
NESTED = ("state_dict", "model")  # where checkpoints keep their state dict


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, ``.safetensors`` or torch's format (read with ``weights_only``: nothing in it is run).

    Raises:
        lba_exp.errors.WeightsError: no such file, not readable, or no state dict in it.
    """
    return _state_dict(_read(Path(path)), path)


def read_model(
    source: str | Path,
    *,
    num_heads: int | None = None,
    image_size: int | Sequence[int] | None = None,
    pool: str | None = None,
    softmax: bool = False,
) -> nn.Module:
    """The model in a file or folder, whatever it is, in evaluation mode.

    Args:
        source: a run folder, or one of its checkpoints; a folder of ``save_pretrained``; or weights in a published naming, as a file or
            in a folder (``model.safetensors`` or ``pytorch_model.bin``).
        num_heads, image_size, pool, softmax: for published weights, see ``load_lion_vision`` and ``load_lion_mlm``; the number of heads
            may come from a ``config.json`` beside the weights (``num_attention_heads``).

    Raises:
        lba_exp.errors.WeightsError: nothing that can be read, or an argument that is missing, or that means nothing here.
    """
    source = Path(source)
    given = {"num_heads": num_heads, "image_size": image_size, "pool": pool, "softmax": softmax or None}
    given = {name: value for name, value in given.items() if value is not None}
    config = _config(source)
    if {"kind", "mixer"} <= config.keys():
        _none_of(given, source)
        return from_pretrained(source)
    path = _file(source)
    content = _read(path)
    if content.get(MODEL_CONFIG) is not None:
        _none_of(given, source)
        model = create(content[MODEL_CONFIG])
        state = content["state_dict"]
        load_weights(model, {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}, str(path))
        return model.eval()
    weights = _state_dict(content, path)
    if "num_attention_heads" in config:
        given.setdefault("num_heads", config["num_attention_heads"])
    if "patch_embed.proj.weight" in weights:
        _all_of(given, ("num_heads", "image_size", "pool"), "a vision model")
        return load_lion_vision(weights, **given)
    if any(name.startswith("bert.") for name in weights):
        _all_of(given, ("num_heads",), "a masked language model")
        _none_of({k: v for k, v in given.items() if k != "num_heads"}, source)
        return load_lion_mlm(weights, num_heads=given["num_heads"])
    raise WeightsError(
        f"{path} holds no weights in a published naming: expected patch_embed.proj.weight or bert.embeddings.*, "
        f"got {', '.join(list(weights)[:3])}."
    )


def write_published(model: nn.Module, path: str | Path) -> None:
    """Writes a model in the published naming to a new ``.safetensors`` file; WeightsError where that cannot be."""
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: give a name that ends in .safetensors.")
    if path.exists():
        raise WeightsError(f"{path} exists already: give another name.")
    weights = to_published(model)
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
    except OSError as error:
        raise WeightsError(f"{path} cannot be written ({error.strerror or error}).") from None


def _config(source: Path) -> dict[str, Any]:
    """The config.json in, or beside, ``source``; empty where there is none."""
    path = (source if source.is_dir() else source.parent) / CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON ({error}).") from None
    return config if isinstance(config, dict) else {}


def _file(source: Path) -> Path:
    """The file with the weights: ``source`` itself, or in that folder."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise WeightsError(f"{source} does not exist: give a file of weights or a folder that holds one.")
    for name in (*FILES, "checkpoints/best.ckpt"):
        if (source / name).is_file():
            return source / name
    raise WeightsError(f"{source} holds no weights: expected {', '.join(FILES)}, or a run's checkpoints/.")


def _read(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise WeightsError(f"{path} is no file: give a file of weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, LookupError, EOFError):  # what bytes of another kind make of the unpickler
        raise WeightsError(f"{path} holds more than tensors and plain values, or is no file of torch's: it is not opened.") from None
    except Exception as error:  # torch meets files of other kinds with errors of many kinds
        said = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise WeightsError(f"{path} cannot be read ({said}).") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}: expected a state dict.")
    return content


def _state_dict(content: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    for key in NESTED:
        if isinstance(content.get(key), dict):
            content = content[key]
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds no state dict: expected names and tensors.")
    return content


def _all_of(given: dict[str, Any], needed: tuple[str, ...], what: str) -> None:
    for name in needed:
        if name not in given:
            raise WeightsError(f"{name} is needed for the published weights of {what}: they do not tell it.")


def _none_of(given: dict[str, Any], source: Path) -> None:
    if given:
        raise WeightsError(f"{next(iter(given))} means nothing for {source}: it is for published weights of another kind.")
