"""What is added to, or put before, the tokens: learned positions and a class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lba_exp.nn.checks import check_positive


class PositionalEmbedding(nn.Module):
    """Adds a learned vector to each position: (B, L, width) -> (B, L, width); ValueError for L above ``length``.

    Initialised from a normal distribution of deviation 0.02, cut at two deviations.
    """

    weight_decay_exempt = True

    def __init__(self, length: int, width: int):
        super().__init__()
        check_positive(length=length, width=width)
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(length, width), std=0.02, a=-0.04, b=0.04))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length > len(self.weight):
            raise ValueError(f"length: expected at most {len(self.weight)} tokens, the positional embedding's length, got {length}")
        return x + self.weight[:length]


class ClassToken(nn.Module):
    """Puts one learned token first: (B, L, width) -> (B, L + 1, width), real under the padding mask, which is returned beside it."""

    weight_decay_exempt = True

    def __init__(self, width: int):
        super().__init__()
        check_positive(width=width)
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02, a=-0.04, b=0.04))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        token = self.weight.to(x.dtype).expand(len(x), 1, -1)
        if padding_mask is not None:
            padding_mask = torch.cat([padding_mask.new_ones(len(x), 1), padding_mask], dim=1)
        return torch.cat([token, x], dim=1), padding_mask
