"""Initial decays, and projections beside them, for long sequences: the diagonal state spaces of the HiPPO line, as the paper takes them
for Long Range Arena (arXiv 2502.16249; S4D, arXiv 2206.11893; S5, arXiv 2208.04933).

A head is read as a diagonal system with one state per key channel, x' = A_n x + v, sampled with a step Delta: its decay is
lambda = exp(Delta A_n), and the zero-order hold weighs its input by A_n^-1 (exp(Delta A_n) - 1), which is about Delta.

The paper puts that weight into W_v. There it is a factor of the output's channels: a state's rows decay by key channel, its columns are
value channels. A recurrence without a denominator needs the factor, as its sum over a memory is that of about 1 / Delta tokens. A scaled
output is a mean already, and starts about Delta times as large as without: it is learnt more slowly at first (experiments/README.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PROJECTION_DEVIATION = 0.1  # of W_q, W_k and the gate's weights


def rates(init: str, heads: int, key_width: int) -> Tensor:
    """A_n, (heads, key_width) float64: -(n + 1) for ``"hippo"`` (S4D-Real), -1/2 for ``"hippo_lin"`` (real part of S4D-Lin)."""
    channel = torch.arange(key_width, dtype=torch.float64)
    return (-(channel + 1) if init == "hippo" else torch.full_like(channel, -0.5)).expand(heads, -1)


def draw_steps(heads: int, key_width: int, dt_min: float, dt_max: float) -> Tensor:
    """Delta, (heads, key_width) float64, log-uniform in [dt_min, dt_max]; one per channel, as in S5."""
    low, high = math.log(dt_min), math.log(dt_max)
    return (low + (high - low) * torch.rand(heads, key_width, dtype=torch.float64)).exp()


def zero_order_hold(rate: Tensor, step: Tensor) -> Tensor:
    """A^-1 (exp(Delta A) - 1), elementwise."""
    return torch.expm1(step * rate) / rate


@torch.no_grad()
def initialise_projections(qkv: nn.Linear, hold: Tensor) -> None:
    """W_q, W_k ~ N(0, 0.1^2); W_v: rows of N(0, 1 / width) times the zero-order hold of their channel; biases 0.

    Args:
        qkv: Linear(width, 3 width), rows q, k, v, each by head.
        hold: (heads, width / heads).
    """
    width = qkv.in_features
    nn.init.normal_(qkv.weight[: 2 * width], std=PROJECTION_DEVIATION)
    nn.init.normal_(qkv.weight[2 * width :], std=width**-0.5)
    qkv.weight[2 * width :] *= hold.reshape(-1, 1).to(qkv.weight.dtype)
    nn.init.zeros_(qkv.bias)
