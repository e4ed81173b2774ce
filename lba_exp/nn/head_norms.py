"""Norms of what the heads of an attention layer give, before its output projection: (B, L, width) -> (B, L, width)."""

from torch import Tensor, nn

from lba_exp.ops.checks import choice

NORMS = ("none", "layer", "rms", "group")


class HeadNorm(nn.GroupNorm):
    """Group norm with one group a head (RetNet, arXiv 2307.08621, equation 8), token by token: (B, L, width) -> (B, L, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


class RMSNorm(nn.RMSNorm):
    """Root mean square norm in the dtype of its weights: autocast leaves it in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def make_head_norm(norm: str, width: int, heads: int, eps: float) -> nn.Module:
    """The norm between attention and output projection: (B, L, width) -> (B, L, width)."""
    choice("norm", norm, NORMS)
    if norm == "none":
        return nn.Identity()
    if norm == "group":
        return HeadNorm(heads, width, eps=eps)
    return nn.LayerNorm(width, eps=eps) if norm == "layer" else RMSNorm(width, eps=eps)
