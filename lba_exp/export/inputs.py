"""What a model takes, in words and as examples: names, dtypes, and which sizes are free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lba_exp.errors import UserError
from lba_exp.models.classifier import SequenceClassifier, TwoTowers
from lba_exp.models.language import TextModel
from lba_exp.models.vision import VisionTransformer

BATCH, LENGTH = "batch", "length"


@dataclass(frozen=True)
class Input:
    """One tensor that a model takes.

    Attributes:
        shape: numbers, and "batch" and "length" for what is free.
        draw: (shape in numbers, generator) -> an example.
    """

    name: str
    shape: tuple[str | int, ...]
    dtype: torch.dtype
    draw: Callable[[tuple[int, ...], torch.Generator], Tensor]

    @property
    def free(self) -> dict[int, str]:
        """Axis -> name of each free size."""
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}


@dataclass(frozen=True)
class Inputs:
    """All that a model takes, in order.

    Attributes:
        fixed: the only number of tokens of a sequence; None where it is free.
        longest: tokens of a sequence at most; None: no limit.
    """

    tensors: tuple[Input, ...]
    fixed: int | None
    longest: int | None

    def example(self, batch: int, length: int, seed: int = 0) -> tuple[Tensor, ...]:
        """One of each, of ``batch`` sequences of ``length`` tokens, where these are free."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {BATCH: batch, LENGTH: length}
        return tuple(x.draw(tuple(sizes.get(size, size) for size in x.shape), generator).to(x.dtype) for x in self.tensors)

    def lengths(self, chunk: int) -> tuple[int, list[int]]:
        """Tokens of the example that an export sees, and of three that it does not see; ``chunk``: tokens of the model's chunks."""
        if self.fixed is not None:
            return self.fixed, []
        seen = 2 * chunk + 3
        if self.longest is not None and self.longest < 4 * seen:
            seen, others = max(2, 3 * self.longest // 4), (self.longest, self.longest // 2, self.longest // 3)
        else:
            others = (4 * seen, 2 * seen + 1, seen // 3)  # from less than a chunk to some of them
        return seen, sorted({n for n in others if n not in (0, seen)})


def _values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _numbers_below(count: int) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    return lambda shape, generator: torch.randint(count, shape, generator=generator)


def _mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    mask = torch.rand(shape, generator=generator) > 0.2
    mask[..., 0] = True
    return mask


def inputs_of(model: nn.Module, *, batch: int | None = None, padding_mask: bool = False, token_types: bool = False) -> Inputs:
    """What a model takes; with ``token_types`` the mask, too. UserError for a model of another package, or one without token types."""
    dtype, positions, fixed, types = next(model.parameters()).dtype, getattr(model, "positions", None), None, None
    sequence: tuple[str | int, ...] = (BATCH, LENGTH)
    if isinstance(model, VisionTransformer):
        sequence = (BATCH, model.grid[0] * model.grid[1])
        fixed, positions = sequence[1], None
        first = Input("inputs", (BATCH, model.channels, *model.image_size), dtype, _values)
    elif isinstance(model, SequenceClassifier):
        if isinstance(model, TwoTowers):
            sequence = (BATCH, 2, LENGTH)
        if model.channels is None:
            first = Input("inputs", sequence, torch.int64, _numbers_below(model.embedding.num_embeddings))
        else:
            first = Input("inputs", (*sequence, model.channels), dtype, _values)
    elif isinstance(model, TextModel):
        positions = model.encoder.positions
        first = Input("inputs", sequence, torch.int64, _numbers_below(model.encoder.embedding.num_embeddings))
        types = model.encoder.token_types
    else:
        raise UserError(f"{type(model).__name__} is no model of this package, or made from one: its inputs are not known.")
    tensors = [first]
    if padding_mask or token_types:
        tensors.append(Input("padding_mask", sequence, torch.bool, _mask))
    if token_types:
        if types is None:
            raise UserError(f"this {type(model).__name__} has no token types: leave them out.")
        tensors.append(Input("token_types", sequence, torch.int64, _numbers_below(len(types.weight))))
    longest = None if positions is None else len(positions.weight)
    orders = [mixer.orders for mixer in model.mixers if getattr(mixer, "orders", None) is not None]
    if fixed is None and orders:  # a scan reads a grid of one size
        fixed = orders[0].shape[1] - (getattr(model, "class_token", None) is not None)
    if fixed is None and longest is not None and longest < 4:
        fixed = longest  # too few lengths to be free
    known = {name: size for name, size in ((BATCH, batch), (LENGTH, fixed)) if size is not None}
    tensors = [replace(x, shape=tuple(known.get(size, size) for size in x.shape)) for x in tensors]
    return Inputs(tuple(tensors), fixed, longest)
