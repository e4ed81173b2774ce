"""Checks of arguments that several layers share. Each raises ValueError naming the argument, what was given and what is valid."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def check_choice(argument: str, value: str, valid: Iterable[str]) -> None:
    valid = tuple(valid)
    if value not in valid:
        raise ValueError(f"{argument} is {value!r}: choose one of {', '.join(valid)}.")


def check_positive(**sizes: int) -> None:
    for argument, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument} is {value!r}: it must be an integer of at least 1.")


def check_heads(width: int, heads: int) -> None:
    check_positive(width=width, heads=heads)
    if width % heads:
        raise ValueError(f"heads is {heads}: it must divide the width, {width}.")


def check_padding_mask(padding_mask: Tensor | None, batch: int, length: int) -> None:
    if padding_mask is None:
        return
    if padding_mask.dtype != torch.bool or tuple(padding_mask.shape) != (batch, length):
        raise ValueError(
            f"padding_mask is {padding_mask.dtype} of shape {tuple(padding_mask.shape)}: "
            f"it must be torch.bool of shape ({batch}, {length}), True at real tokens."
        )
