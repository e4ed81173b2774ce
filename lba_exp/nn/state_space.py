"""What Mamba-2, Hydra and Gated DeltaNet share: step sizes with their decays; and the width of what a convolution reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.nn.checks import check_positive
from lba_exp.nn.gates import at_least_float32, linear_at_least_float32

STEPS = (1e-3, 1e-1)  # initial step sizes, log-uniform
RATES = (1.0, 16.0)  # initial decay rates, uniform


def step_biases(number: int) -> Tensor:
    """Biases b with softplus(b) log-uniform in [1e-3, 1e-1]: (number,) float32."""
    steps = torch.empty(number).uniform_(*(math.log(step) for step in STEPS)).exp()
    return steps + torch.log(-torch.expm1(-steps))


class StepSizes(nn.Module):
    """Delta = softplus(W x + b) and log lambda = -Delta exp(a), numbers per token, direction and head (Mamba-2, arXiv 2405.21060).

    b and a belong to a head, in all directions; each direction has a W of its own. softplus(b) starts log-uniform in [1e-3, 1e-1], exp(a)
    uniform in [1, 16]. In at least float32 under every precision and autocast: decays are multiplied over hundreds of tokens.
    """

    weight_decay_exempt = True

    def __init__(self, width: int, heads: int, directions: int = 1):
        super().__init__()
        check_positive(width=width, heads=heads, directions=directions)
        self.directions = directions
        self.projection = nn.Linear(width, directions * heads, bias=False)
        self.bias = nn.Parameter(step_biases(heads))
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(*RATES).log())

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, L, width) -> for each direction (Delta, log lambda), (B, L, heads) each."""
        raw = linear_at_least_float32(x, self.projection).unflatten(-1, (self.directions, -1))
        steps = F.softplus(raw + self.bias)
        rates = at_least_float32(self.log_rate).exp()
        return [(own, -rates * own) for own in steps.unbind(2)]


def inner_width(width: int, heads: int, expand: int, state: int) -> int:
    """Features inside, expand * width; ValueError where they do not divide among the heads, or a number is not valid."""
    check_positive(width=width, heads=heads, expand=expand, state=state)
    if expand * width % heads:
        raise ValueError(f"heads: expected a divisor of expand * width = {expand * width}, got {heads}")
    return expand * width
