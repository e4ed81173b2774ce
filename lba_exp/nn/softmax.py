"""Softmax attention, the drop-in baseline."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.nn.checks import check_heads, check_padding_mask
from lba_exp.nn.scans import direction_of_layer
from lba_exp.registry import FEATURE_MAPS


class SoftmaxAttention(nn.Module):
    """Softmax(phi(Q) phi(K)^T / sqrt(d)) V, then an output projection (torch's ``scaled_dot_product_attention``).

    Args:
        width: features per token, in and out.
        heads: heads; divides width.
        feature_map: phi, on queries and keys: a name in ``lba_exp.registry.FEATURE_MAPS``; ``"identity"`` is the Transformer's attention.
        direction: ``"both"``, ``"forward"`` (causal), ``"backward"``, or ``"alternating"`` (by ``layer``: even ones forward).
        layer: index of the layer, for ``direction="alternating"``.

    Raises:
        ValueError: for a value that is not valid.
        lba_exp.errors.ConfigError: for an unknown feature map.

    It has no recurrent form: ``forms`` is empty and ``state_size`` is None (it would have to keep every key and value).
    """

    forms: tuple[str, ...] = ()
    state_size = None
    sequence_conflict = "softmax attention reads every key and value of the sequence"

    def __init__(self, width: int, heads: int, *, feature_map: str = "identity", direction: str = "both", layer: int = 0):
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.feature_map_name, self.feature_map = feature_map, FEATURE_MAPS[feature_map]
        self.direction = direction_of_layer(direction, layer)
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width), and (B, L) bool with True at real tokens -> (B, L, width). Padded keys are left out."""
        check_padding_mask(padding_mask, *x.shape[:2])
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.feature_map(q).to(v.dtype), self.feature_map(k).to(v.dtype)
        mask = self._mask(x, padding_mask)
        causal = self.direction == "forward" and mask is None
        return self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2).flatten(2))

    def _mask(self, x: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        """Which keys a query may see, for ``attn_mask``; None where torch needs no matrix for it."""
        if padding_mask is None and self.direction != "backward":
            return None
        if self.direction == "both":
            # a sequence of padding alone attends to all of it: a softmax over nothing is NaN on some devices
            return (padding_mask | ~padding_mask.any(1, keepdim=True))[:, None, None, :]
        square = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        side = square.tril() if self.direction == "forward" else square.triu()
        if padding_mask is None:
            return side
        # a padded query sees itself, for the same reason
        return (side & (padding_mask[:, None, :] | (square.tril() & square.triu())))[:, None]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, feature_map={self.feature_map_name}, direction={self.direction}"
