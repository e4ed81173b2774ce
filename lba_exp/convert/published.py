"""Our models in the published naming."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lba_exp import registry
from lba_exp.convert import mlm, names, vision
from lba_exp.errors import WeightsError
from lba_exp.models.pretrained import some

# settings that change no number, or only how a training begins
FREE = ("form", "chunk_size", "gate_init")


def to_published(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a ``VisionTransformer``, ``MaskedLM`` or ``TextClassifier`` in the published naming (copies).

    Raises:
        lba_exp.errors.WeightsError: the naming has no place for a weight or a setting of the model, so that whoever loads it would compute
            something else; the sentence names it.
    """
    config = getattr(model, "config", None)
    if config is None or config["kind"] not in ("vit", "masked_lm", "text_classifier"):
        raise WeightsError(f"there is no published naming for {type(model).__name__}: it has one for vit, masked_lm and text_classifier.")
    mixers = config["mixer"] if isinstance(config["mixer"], list) else [config["mixer"]] * config["depth"]
    filled = _defaults(type(model)) | config | {"mixer": mixers}
    pairs = vision.pairs(filled) if config["kind"] == "vit" else mlm.pairs(filled)
    own = model.state_dict()
    if homeless := [name for name in own if name not in {pair.ours for pair in pairs}]:
        raise WeightsError(f"the published naming has no place for {some(homeless)}.")
    if absent := [pair.ours for pair in pairs if pair.ours not in own]:
        raise WeightsError(f"the published naming needs {some(absent)}, which this model has not.")
    published = names.store(pairs, own)
    _check_meaning(filled, reloaded(published, filled).config)
    return published


def reloaded(published: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """The model that a published state dict stands for, with what the naming does not tell taken from ``config``."""
    if config["kind"] != "vit":
        return mlm.load_lion_mlm(published, num_heads=config["heads"])
    softmax = any(mixer["kind"] == "softmax" for mixer in config["mixer"])
    pool = "cls" if config["pooling"] == "class_token" else "mean"
    return vision.load_lion_vision(published, num_heads=config["heads"], image_size=config["image_size"], pool=pool, softmax=softmax)


def _check_meaning(config: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    for layer, (mixer, other) in enumerate(zip(config["mixer"], read["mixer"], strict=True)):
        mixer, other = _with_defaults(mixer), _with_defaults(other)
        for key in {*mixer, *other} - set(FREE):
            if mixer.get(key) != other.get(key):
                raise WeightsError(
                    f"the published naming means {key}={other.get(key)!r} in layer {layer}, and this model has {mixer.get(key)!r}."
                )


def _with_defaults(mixer: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in mixer.items()}
    return _defaults(registry.MIXERS[mixer["kind"]]) | plain


def _defaults(constructor: type) -> dict[str, Any]:
    """Default values of the keyword arguments of a class."""
    return {name: p.default for name, p in inspect.signature(constructor).parameters.items() if p.default is not p.empty}
