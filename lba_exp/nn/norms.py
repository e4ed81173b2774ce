"""Norms over tokens: (B, L, width) -> (B, L, width)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lba_exp.nn.checks import check_padding_mask, check_positive
from lba_exp.nn.sequence_ranks import SequenceRanks
from lba_exp.ops.checks import choice

NORMS = ("layer", "batch")
_recomputing = False  # no ContextVar, at which torch 2.11 breaks a graph


@contextmanager
def recomputation() -> Iterator[None]:
    """Inside, batch norms leave their running statistics alone: a checkpointed block would count each batch twice."""
    global _recomputing
    before, _recomputing = _recomputing, True
    try:
        yield
    finally:
        _recomputing = before


class BatchNorm(nn.Module):
    """Normalises each feature over all real tokens of a batch (arXiv 1502.03167); in evaluation by the running statistics.

    Padded tokens enter neither mean nor variance. Statistics are of one device's batch (of the whole sequences in it, where their tokens
    lie on several ranks, ``sequence_ranks``) and computed in float32. A batch without a real token leaves the running statistics as they
    are.

    Args:
        width: features per token.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.
    """

    sequence_ranks: SequenceRanks | None = None

    def __init__(self, width: int, *, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        check_positive(width=width)
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width), and (B, L) bool with True at real tokens -> (B, L, width), dtype kept; padded tokens are normalised alike."""
        check_padding_mask(padding_mask, *x.shape[:2])
        with torch.autocast(x.device.type, enabled=False):
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            mean, variance = self._statistics(exact, padding_mask) if self.training else (self.running_mean, self.running_var)
            return ((exact - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)

    def _statistics(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        weight = x.new_ones(*x.shape[:2], 1) if padding_mask is None else padding_mask.unsqueeze(-1).to(x.dtype)
        everywhere = (lambda y: y) if self.sequence_ranks is None else self.sequence_ranks.sum
        total = everywhere(weight.sum())
        count = total.clamp(min=1)
        mean = everywhere((x * weight).sum((0, 1))) / count
        variance = everywhere(((x - mean).square() * weight).sum((0, 1))) / count
        if not _recomputing:
            with torch.no_grad():
                share = self.momentum * (total > 0)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                unbiased = variance * count / (count - 1).clamp(min=1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        return mean, variance

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, momentum={self.momentum}"


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """The norm of that name: ``"layer"`` or ``"batch"``."""
    choice("norm", kind, NORMS)
    return nn.LayerNorm(width, eps=eps) if kind == "layer" else BatchNorm(width, eps=eps)


def normalise(norm: nn.Module, x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """``norm`` of x; a batch norm is told which tokens are real."""
    return norm(x, padding_mask) if isinstance(norm, BatchNorm) else norm(x)
