"""Feature maps on queries and keys: (..., D) -> (..., D), dtype kept, one head per last dimension.

All but ``identity`` are non-negative, so that the scores q.k, and with them the denominator of scaled attention, are non-negative too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def identity(x: Tensor) -> Tensor:
    """x itself: RetNet, and the paper's masked language models (arXiv 2502.16249, released code)."""
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, elementwise: x + 1 above 0, exp(x) below (Linear Transformer, arXiv 2006.16236, section 3.2.1; LION-LIT for vision)."""
    # written out: elu(x) + 1 cancels for x well below 0 and is exactly 0 in half precision
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def silu_normalised(x: Tensor) -> Tensor:
    """(SiLU(x) + 0.5) / norm(SiLU(x) + 0.5) over the last dimension: LION-D and LION-S (arXiv 2502.16249).

    SiLU is never below -0.28, so no entry and no norm is ever 0. Computed in at least float32.
    """
    shifted = F.silu(x.to(torch.promote_types(x.dtype, torch.float32))) + 0.5
    return (shifted / torch.linalg.vector_norm(shifted, dim=-1, keepdim=True)).to(x.dtype)


def relu(x: Tensor) -> Tensor:
    """max(x, 0), elementwise. A token whose query is 0 everywhere gets the output 0."""
    return F.relu(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), elementwise."""
    return torch.sigmoid(x)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension, each head by itself (the feature map of efficient attention, arXiv 1812.01243)."""
    return torch.softmax(x, dim=-1).to(x.dtype)
