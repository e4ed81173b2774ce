"""Weights that a run starts from: those of another run, or of a model folder, as far as they are the same model's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lba_exp.callbacks.checkpoints import load_checkpoint
from lba_exp.checks import weights_file
from lba_exp.convert.files import read_weights
from lba_exp.errors import ConfigError
from lba_exp.models.pretrained import CONFIG, MODEL_CONFIG

POSITIONS, EMBEDDING = "encoder.positions.weight", "encoder.embedding.weight"
ROUND = (8, 64, 128)  # published vocabularies are filled up to a multiple of these
ALIKE = ("norm_position", "norm_eps", "mlp")  # settings of a model that its weights do not show
FREE = ("form", "chunk_size", "layer")  # settings of a mixer that do not change what it computes, or that follow from its place


def initialise(model: nn.Module, path: Path, data: Any = None) -> list[str]:
    """Copies weights into a model; those of another model must be all of its own, unless it says otherwise.

    A model with ``own_parts`` (a text classifier's pooler and head) takes the encoder of any model that has one: a masked language model,
    or the classifier of another task. Its own parts are taken where they are there and fit, and start anew otherwise. Learned positions
    may be more than it has: the first ones are taken; so are those of a vocabulary that was filled up to a round number.

    Args:
        path: a run folder, a checkpoint, a model folder or its model.safetensors.
        data: the run's data module; where both it and the checkpoint know their vocabulary, they have to be equal.

    Returns:
        What there is to tell, in sentences.

    Raises:
        ConfigError: weights that do not fit, with the setting that is behind it where one can be told.
        lba_exp.errors.UserError: a file that cannot be read.
    """
    source, path = f"init_from={path}", weights_file(path)
    if path.suffix == ".safetensors":  # of a model folder
        weights, config, content = read_weights(path), _config_beside(path), {}
    else:
        content = load_checkpoint(path)
        weights = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
        config = content.get(MODEL_CONFIG) or {}
    own = model.state_dict()
    parts = getattr(model, "own_parts", ())
    if not parts:
        if EMBEDDING in own and EMBEDDING in weights and (there := len(weights[EMBEDDING])) != len(own[EMBEDDING]):
            raise ConfigError(_other_vocabulary(source, there, len(own[EMBEDDING])))
        _check_vocabulary(content, data, source)
        check_weights(own, weights, source)
        model.load_state_dict(weights)
        return []
    _check_encoder(own, weights, config, getattr(model, "config", None) or {}, source)
    _check_vocabulary(content, data, source)
    taken = {name: value for name, value in weights.items() if name.startswith("encoder.")}
    for name in {POSITIONS, EMBEDDING} & {*own} & {*taken}:
        taken[name] = taken[name][: len(own[name])]
    anew = []
    for part in parts:
        names = [name for name in own if name.startswith(f"{part}.")]
        if all(name in weights and weights[name].shape == own[name].shape for name in names):
            taken |= {name: weights[name] for name in names}
        else:
            anew.append(part)
    check_weights({name: value for name, value in own.items() if name.split(".")[0] not in anew}, taken, source)
    model.load_state_dict(own | taken)
    told = f"the encoder's weights are taken, {' and '.join(anew)} start anew" if anew else "all weights are taken"
    return [f"{source}: {told}.", *_differences(config, getattr(model, "config", None) or {}, source)]


def check_weights(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], source: str) -> None:
    """Raises ConfigError where two state dicts differ in names or shapes."""
    wrong = sorted({*theirs} ^ {*own}) or [k for k in own if own[k].shape != theirs[k].shape]
    if wrong:
        raise ConfigError(f"{source} holds another model: {wrong[0]} is missing there or here, or has another shape.")


def _check_encoder(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], config: dict, mine: dict, source: str) -> None:
    """The sizes of an encoder, one by one; raises ConfigError."""
    if EMBEDDING not in theirs:
        raise ConfigError(f"{source} holds no encoder of text (no {EMBEDDING}): give a masked language model, or a text classifier.")
    (vocabulary, width), (tokens, here) = theirs[EMBEDDING].shape, own[EMBEDDING].shape
    if vocabulary not in (tokens, *(-(-tokens // to) * to for to in ROUND)):
        raise ConfigError(_other_vocabulary(source, vocabulary, tokens))
    depth, heads = _depth(theirs), config.get("heads")
    for key, theirs_value, own_value in (
        ("width", width, here),
        ("depth", depth, _depth(own)),
        ("heads", heads or mine.get("heads"), mine.get("heads")),
    ):
        if theirs_value != own_value:
            raise ConfigError(f"{source} has {theirs_value} as model.{key}, and this run {own_value}: give model.{key}={theirs_value}.")
    if (POSITIONS in theirs) != (POSITIONS in own):
        has = POSITIONS in theirs
        raise ConfigError(
            f"{source} has {'a' if has else 'no'} positional embedding: give model.positional_embedding={'true' if has else 'false'}."
        )
    if POSITIONS in own and len(theirs[POSITIONS]) < len(own[POSITIONS]):
        raise ConfigError(
            f"{source} has {len(theirs[POSITIONS])} positions, and data.max_length={len(own[POSITIONS])}: "
            f"give data.max_length={len(theirs[POSITIONS])}, or less."
        )


def _other_vocabulary(source: str, there: int, here: int) -> str:
    return f"{source} has a vocabulary of {there:,} tokens, and data.vocabulary one of {here:,}: give the one it was trained with."


def _check_vocabulary(content: Mapping[str, Any], data: Any, source: str) -> None:
    kept = next((s["vocabulary"] for s in content.values() if isinstance(s, dict) and isinstance(s.get("vocabulary"), str)), None)
    mine = data.state_dict().get("vocabulary") if kept is not None and data is not None else None
    if mine is not None and mine != kept:
        raise ConfigError(
            f"{source} was trained with another vocabulary of as many tokens than data.vocabulary, or another data.lowercase: "
            "give the one it was trained with."
        )


def _depth(weights: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")})


def _config_beside(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path.parent / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _differences(theirs: dict, mine: dict, source: str) -> list[str]:
    """Settings that give weights of these names and shapes another meaning: the run may want that, and should know."""
    if not {"mixer"} <= theirs.keys() or not {"mixer"} <= mine.keys():
        return []
    told = {key: (theirs.get(key), mine.get(key)) for key in ALIKE}
    first, second = (m["mixer"][0] if isinstance(m["mixer"], list) else m["mixer"] for m in (theirs, mine))
    told |= {f"mixer.{key}": (first.get(key), second.get(key)) for key in sorted({*first, *second} - {*FREE})}
    return [
        f"{source} was trained with model.{key}={there}, and this run has {here}."
        for key, (there, here) in told.items()
        if there != here and None not in (there, here)
    ]
