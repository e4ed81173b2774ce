"""Pairs of weights, ours and published, that can be read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lba_exp.errors import WeightsError
from lba_exp.models.pretrained import create, load_weights, some


@dataclass(frozen=True)
class Pair:
    """One of our tensors, and the published tensors that hold the same numbers.

    Attributes:
        ours: name in our model.
        theirs: published names.
        load: published tensors, in the order of ``theirs``, -> ours.
        store: ours -> published tensors.
    """

    ours: str
    theirs: tuple[str, ...]
    load: Callable[..., Tensor]
    store: Callable[[Tensor], tuple[Tensor, ...]]


def same(ours: str, theirs: str) -> Pair:
    return Pair(ours, (theirs,), lambda x: x, lambda x: (x,))


def both(ours: str, theirs: str) -> list[Pair]:
    """Weight and bias of a linear map, a convolution or a norm."""
    return [same(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def negated(ours: str, theirs: str) -> list[Pair]:
    """Weight and bias of a gate that is published as 1 - sigmoid(W x + b), which is sigmoid(-W x - b)."""
    return [Pair(f"{ours}.{part}", (f"{theirs}.{part}",), torch.neg, lambda x: (-x,)) for part in ("weight", "bias")]


def flat(ours: str, theirs: str, leading: int = 0) -> Pair:
    """A vector that is published with any number of dimensions of size 1; stored with ``leading`` of them in front."""
    return Pair(ours, (theirs,), lambda x: x.reshape(-1), lambda x: (x.reshape(*[1] * leading, *x.shape),))


def stacked(ours: str, theirs: tuple[str, ...]) -> Pair:
    """Several tensors of equal shape, one below the other."""
    return Pair(ours, theirs, lambda *parts: torch.cat(parts), lambda x: tuple(x.chunk(len(theirs))))


def load(pairs: Iterable[Pair], published: Mapping[str, Tensor], ignored: Iterable[str] = ()) -> dict[str, Tensor]:
    """Our state dict from a published one; WeightsError naming the keys that are missing or unknown."""
    pairs, ignored = list(pairs), set(ignored)
    expected = [name for pair in pairs for name in pair.theirs]
    if missing := [name for name in expected if name not in published]:
        raise WeightsError(f"the weights lack {some(missing)}.")
    if unknown := [name for name in published if name not in {*expected, *ignored}]:
        raise WeightsError(f"the weights hold {some(unknown)}, which this kind of model has not.")
    return {pair.ours: _loaded(pair, [published[name] for name in pair.theirs]) for pair in pairs}


def _loaded(pair: Pair, tensors: list[Tensor]) -> Tensor:
    try:
        return pair.load(*tensors)
    except (RuntimeError, IndexError):
        shapes = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tensors)
        raise WeightsError(f"{', '.join(pair.theirs)}: shapes or dtypes that do not fit ({shapes}).") from None


def build(config: Mapping[str, Any], pairs: Iterable[Pair], published: Mapping[str, Tensor], ignored: Iterable[str] = ()) -> nn.Module:
    """The model of a configuration with published weights, in evaluation mode; WeightsError where they do not fit."""
    try:
        model = create(config)
    except ValueError as error:
        raise WeightsError(f"the weights make no model of this package ({error}).") from None
    load_weights(model, load(pairs, published, ignored), "the converted model")
    return model.eval()


def checked(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A copy of a published state dict; WeightsError where something in it is no tensor."""
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{name} is a {type(value).__name__}: expected a tensor.")
    return dict(state_dict)


def store(pairs: Iterable[Pair], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict from ours."""
    found: dict[str, Tensor] = {}
    for pair in pairs:
        found |= zip(pair.theirs, (x.detach().clone() for x in pair.store(own[pair.ours])), strict=True)
    return found


def depth(published: Mapping[str, Tensor], prefix: str) -> int:
    """Number of layers: names are ``prefix.N.rest``; WeightsError where a number is left out, or there is none."""
    found = set()
    for name in published:
        number = name.removeprefix(f"{prefix}.").partition(".")[0] if name.startswith(f"{prefix}.") else ""
        if number.isdecimal():
            found.add(int(number))
    if found != set(range(len(found))) or not found:
        raise WeightsError(f"the weights hold the layers {sorted(found) or 'none'} of {prefix}.N: expected 0, 1, 2, ... without gaps.")
    return len(found)


def shape(published: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a published tensor; WeightsError where it is missing or has another number of dimensions."""
    if name not in published:
        raise WeightsError(f"the weights lack {name}.")
    if published[name].ndim != dimensions or not published[name].numel():
        raise WeightsError(f"{name} has the shape {tuple(published[name].shape)}: expected {dimensions} dimensions, none of size 0.")
    return tuple(published[name].shape)


def check_heads(num_heads: object, width: int) -> None:
    """Raises WeightsError unless the number of heads divides the width."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1 or width % num_heads:
        raise WeightsError(f"num_heads={num_heads!r} does not divide the width {width} of these weights: give the number of heads.")


def check_gate(published: Mapping[str, Tensor], name: str, num_heads: int) -> None:
    """Raises WeightsError where a gate, a number or a linear map a head, is of another number of heads."""
    if f"{name}.weight" in published:
        found = shape(published, f"{name}.weight", 2)[0]
    elif name in published:
        found = published[name].numel()
    else:
        return
    if found != num_heads:
        raise WeightsError(f"num_heads={num_heads} does not fit {name}, which holds the gates of {found} heads.")
