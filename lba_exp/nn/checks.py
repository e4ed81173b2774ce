"""Checks of arguments that several layers share, beside those of ``lba_exp.ops.checks``. Each raises ValueError naming the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def check_positive(**sizes: int) -> None:
    for argument, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument}: expected an integer >= 1, got {value!r}")


def check_heads(width: int, heads: int) -> None:
    check_positive(width=width, heads=heads)
    if width % heads:
        raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")


def check_padding_mask(padding_mask: Tensor | None, batch: int, length: int) -> None:
    if padding_mask is None:
        return
    if padding_mask.dtype != torch.bool or tuple(padding_mask.shape) != (batch, length):
        given = f"{padding_mask.dtype} of shape {tuple(padding_mask.shape)}"
        raise ValueError(f"padding_mask: expected torch.bool of shape ({batch}, {length}), True = real token, got {given}")
