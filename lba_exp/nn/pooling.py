"""From the tokens of a sequence to one vector."""

from __future__ import annotations

from torch import Tensor

from lba_exp.nn.sequence_ranks import SequenceRanks

POOLINGS = ("mean", "class_token", "mean_all")  # mean: without a class token; mean_all: over all tokens, a class token among them


def mean_over_real(x: Tensor, padding_mask: Tensor | None, ranks: SequenceRanks | None = None) -> Tensor:
    """Mean over the real tokens, (B, L, width) -> (B, width); 0 for a sequence of padding alone."""
    if padding_mask is None and ranks is None:
        return x.mean(1)
    if padding_mask is None:
        total, tokens = x.sum(1), x.new_full((1, 1), x.shape[1])
    else:
        total, tokens = x.masked_fill(~padding_mask.unsqueeze(-1), 0).sum(1), padding_mask.sum(1, keepdim=True)
    if ranks is not None:
        total, tokens = ranks.sum(total), ranks.sum(tokens)
    return total / tokens.clamp(min=1)


def first_token(x: Tensor, ranks: SequenceRanks | None = None) -> Tensor:
    """(B, L, width) -> (B, width)."""
    if ranks is None:
        return x[:, 0]
    # an empty sum is zero and has a gradient: every rank takes part in the backward pass
    return ranks.sum(x[:, : int(ranks.first)].sum(1))


def pool(x: Tensor, padding_mask: Tensor | None, pooling: str, ranks: SequenceRanks | None = None) -> Tensor:
    """(B, L, width) -> (B, width): the first token for ``"class_token"``, else the mean over the real ones; the same on all ``ranks``."""
    return first_token(x, ranks) if pooling == "class_token" else mean_over_real(x, padding_mask, ranks)
