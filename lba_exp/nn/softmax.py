"""Softmax attention, the drop-in baseline."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.nn.checks import check_heads, check_padding_mask


class SoftmaxAttention(nn.Module):
    """Softmax(Q K^T / sqrt(d)) V in both directions, then an output projection (torch's ``scaled_dot_product_attention``).

    Args:
        width: features per token, in and out.
        heads: heads; divides width (ValueError where not).

    It has no recurrent form: ``forms`` is empty and ``state_size`` is None (it would have to keep every key and value).
    """

    forms: tuple[str, ...] = ()
    state_size = None

    def __init__(self, width: int, heads: int):
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width), and (B, L) bool with True at real tokens -> (B, L, width). Padded keys are left out."""
        check_padding_mask(padding_mask, *x.shape[:2])
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None
        if padding_mask is not None:
            # a sequence of padding alone attends to all of it: a softmax over nothing is NaN on some devices
            mask = (padding_mask | ~padding_mask.any(1, keepdim=True))[:, None, None, :]
        return self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}"
