"""What follows a mixer in a block, token by token: (..., width) -> (..., width)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.nn.sequence_ranks import SequenceRanks

MLPS = ("mlp", "glu", "output_glu")


def gelu_mlp(width: int, hidden: int) -> nn.Module:
    """W2 GELU(W1 x + b1) + b2, with the exact GELU."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class GLU(nn.Module):
    """W2 (GELU(W x + b) * (V x + c)) + b2: the gated MLP GEGLU (arXiv 2002.05202, section 2)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * value)


def output_glu(width: int, dropout: float) -> nn.Module:
    """(W h + b) * sigmoid(V h + c) of h = dropout(GELU(x)): what S4 and S5 put on their mixer's output instead of an MLP.

    Source: arXiv 2111.00396 and 2208.04933, Long Range Arena recipes.
    """
    return nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 2 * width), nn.GLU(dim=-1))


class DropPath(nn.Module):
    """Leaves a residual branch out for whole samples, at random in training (stochastic depth, arXiv 1603.09382): (B, ...) -> (B, ...).

    Args:
        rate: probability of leaving it out, from 0 to below 1; what stays is divided by 1 - rate.

    Where a sample's tokens lie on several ranks (``sequence_ranks``), they are left out together.
    """

    sequence_ranks: SequenceRanks | None = None

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path: expected a number >= 0 and below 1, got {rate}")
        self.rate, self.active = rate, rate > 0
        # as a tensor: compiled blocks with rates of their own share one graph
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.active:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < self.keep
        if self.sequence_ranks is not None:
            kept = self.sequence_ranks.of_first(kept.to(torch.uint8))
        return x * (kept / self.keep).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
