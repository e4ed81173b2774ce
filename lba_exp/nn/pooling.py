"""From the tokens of a sequence to one vector."""

from __future__ import annotations

from torch import Tensor

POOLINGS = ("mean", "class_token", "mean_all")  # mean: without a class token; mean_all: over all tokens, a class token among them


def mean_over_real(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Mean over the real tokens, (B, L, width) -> (B, width); 0 for a sequence of padding alone."""
    if padding_mask is None:
        return x.mean(1)
    tokens = padding_mask.sum(1, keepdim=True).clamp(min=1)
    return x.masked_fill(~padding_mask.unsqueeze(-1), 0).sum(1) / tokens


def pool(x: Tensor, padding_mask: Tensor | None, pooling: str) -> Tensor:
    """(B, L, width) -> (B, width): the first token for ``"class_token"``, else the mean over the real ones."""
    return x[:, 0] if pooling == "class_token" else mean_over_real(x, padding_mask)
