"""How inputs become tokens, and what is added to, or put before, them: learned positions, token types and a class token.

All start on one scale, a deviation of 0.02: a token's value and its position then count alike in the first norm. (With the default of
``nn.Linear`` the embedding of a number, its bias above all, is some 30 times as large as that of its position.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.nn.checks import check_positive
from lba_exp.nn.sequence_ranks import SequenceRanks


def small_(weight: Tensor, deviation: float = 0.02) -> Tensor:
    """Fills ``weight`` from a normal distribution of that deviation, cut at two deviations."""
    return nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def symbol_embedding(vocabulary: int, width: int) -> nn.Embedding:
    """(B, L) of int64 below ``vocabulary`` -> (B, L, width)."""
    check_positive(vocabulary=vocabulary, width=width)
    embedding = nn.Embedding(vocabulary, width)
    small_(embedding.weight)
    return embedding


def channel_embedding(channels: int, width: int) -> nn.Linear:
    """(B, L, channels) of real numbers -> (B, L, width). Its bias starts at 0; inputs are taken to be of the order of 1."""
    check_positive(channels=channels, width=width)
    embedding = nn.Linear(channels, width)
    small_(embedding.weight, 0.02 / math.sqrt(channels))
    nn.init.zeros_(embedding.bias)
    return embedding


class PositionalEmbedding(nn.Module):
    """Adds a learned vector to each position: (B, L, width) -> (B, L, width); ValueError for L above ``length``.

    Where the tokens lie on several ranks (``sequence_ranks``), L is that of the whole sequence, and positions go on from rank to rank.
    """

    weight_decay_exempt = True
    sequence_ranks: SequenceRanks | None = None

    def __init__(self, length: int, width: int):
        super().__init__()
        check_positive(length=length, width=width)
        self.weight = nn.Parameter(small_(torch.empty(length, width)))

    def forward(self, x: Tensor) -> Tensor:
        ranks = self.sequence_ranks
        lengths, rank = ([x.shape[1]], 0) if ranks is None else (ranks.lengths(x.shape[1], x.device), ranks.rank)
        if sum(lengths) > len(self.weight):
            raise ValueError(f"length: expected at most {len(self.weight)} tokens, the positional embedding's length, got {sum(lengths)}")
        start = sum(lengths[:rank])
        return x + self.weight[start : start + x.shape[1]]


class ClassToken(nn.Module):
    """Puts one learned token first: (B, L, width) -> (B, L + 1, width), real under the padding mask, which is returned beside it.

    Where the tokens lie on several ranks (``sequence_ranks``), the first one gets it, and the others' stay (B, L, width).
    """

    weight_decay_exempt = True
    sequence_ranks: SequenceRanks | None = None

    def __init__(self, width: int):
        super().__init__()
        check_positive(width=width)
        self.weight = nn.Parameter(small_(torch.empty(width)))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.sequence_ranks is not None and not self.sequence_ranks.first:
            return x + self.weight[:0].sum().to(x.dtype), padding_mask  # zero: the weight has a gradient on every rank
        token = self.weight.to(x.dtype).expand(x.shape[0], 1, -1)  # len(x) would bind an exported model to one batch size
        if padding_mask is not None:
            padding_mask = torch.cat([padding_mask.new_ones(x.shape[0], 1), padding_mask], dim=1)
        return torch.cat([token, x], dim=1), padding_mask


class TokenTypes(nn.Module):
    """Adds a learned vector for the type of each token (BERT: which of two texts it is in, arXiv 1810.04805)."""

    weight_decay_exempt = True

    def __init__(self, types: int, width: int):
        super().__init__()
        check_positive(types=types, width=width)
        self.weight = nn.Parameter(small_(torch.empty(types, width)))

    def forward(self, x: Tensor, types: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """x (B, L, width), types (B, L) of an integer dtype (None: all 0; any number at padded positions) -> (B, L, width)."""
        if types is None:
            return x + self.weight[0]
        if types.shape != x.shape[:2] or types.is_floating_point() or types.dtype == torch.bool:
            given = f"{types.dtype} of shape {tuple(types.shape)}"
            raise ValueError(f"token_types: expected an integer dtype of shape {tuple(x.shape[:2])}, got {given}")
        if padding_mask is not None:
            types = types.masked_fill(~padding_mask, 0)
        return x + F.embedding(types.long(), self.weight)
