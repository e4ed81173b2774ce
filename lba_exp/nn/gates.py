"""Gates: modules that give each token and head its decay lambda in (0, 1], as log lambda (arXiv 2502.16249, LION-LIT, LION-D and LION-S).

A gate is built as ``Gate(width, heads, init)`` and called with the mixer's input, (B, L, width), and returns what
``lba_exp.ops.step_log_decays`` takes: None, (heads,) or (B, L, heads), never above 0, in float32 (float64 for float64 parameters)
under every precision and autocast: decays are multiplied over hundreds of tokens, and so are their rounding errors.

Initialisation ``"timescales"``: head h starts with a memory of T_h = 1 / (1 - lambda_h) tokens, T log-spaced from 4 (a neighbourhood)
to 256 (all of a short sequence; and after 1,024 tokens still e^-4, so that the slowest head carries a signal across sequences of 64 to
1,024 tokens). One head alone gets the geometric mean, 32. ``"random"`` is the paper's: lambda starts near 1/2, a memory of two tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.nn.checks import check_positive
from lba_exp.ops.checks import choice

INITIALISATIONS = ("timescales", "random")
SHORTEST_MEMORY = 4.0
LONGEST_MEMORY = 256.0


def timescale_logits(heads: int) -> Tensor:
    """Logits a_h with 1 / (1 - sigmoid(a_h)) log-spaced from SHORTEST_MEMORY to LONGEST_MEMORY: (heads,) float32."""
    if heads == 1:
        memory = torch.tensor([math.sqrt(SHORTEST_MEMORY * LONGEST_MEMORY)], dtype=torch.float64)
    else:
        memory = torch.logspace(math.log2(SHORTEST_MEMORY), math.log2(LONGEST_MEMORY), heads, base=2.0, dtype=torch.float64)
    return (memory - 1).log().float()


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Gate(nn.Module):
    """Base of all gates, those of plugins included: the optimizer exempts every parameter of its subclasses from weight decay."""

    weight_decay_exempt = True

    def __init__(self, width: int, heads: int, init: str = "timescales"):
        super().__init__()
        check_positive(width=width, heads=heads)
        choice("gate_init", init, INITIALISATIONS)


class NoGate(Gate):
    """lambda = 1: no decay and no parameters (LION-LIT). Takes the arguments of the other gates; ``forward`` returns None."""

    def forward(self, x: Tensor) -> None:
        return None


class FixedGate(Gate):
    """lambda_h = sigmoid(a_h), one learned a per head (LION-D). ``init="random"``: a ~ N(0, 1). Returns (heads,)."""

    def __init__(self, width: int, heads: int, init: str = "timescales"):
        super().__init__(width, heads, init)
        self.logit = nn.Parameter(timescale_logits(heads) if init == "timescales" else torch.randn(heads))

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(at_least_float32(self.logit))


class SelectiveGate(Gate):
    """lambda = sigmoid(W x + b), one number per token and head (LION-S). Returns (B, L, heads).

    ``init="timescales"``: b holds the memory lengths and W ~ N(0, 0.1^2 / width), so that on a normalised input W x has a deviation of
    0.1 and every gate starts near its bias, with long memory. ``init="random"``: that of ``nn.Linear``.
    """

    def __init__(self, width: int, heads: int, init: str = "timescales"):
        super().__init__(width, heads, init)
        self.projection = nn.Linear(width, heads)
        if init == "timescales":
            nn.init.normal_(self.projection.weight, std=0.1 / math.sqrt(width))
            with torch.no_grad():
                self.projection.bias.copy_(timescale_logits(heads))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = at_least_float32(self.projection.weight), at_least_float32(self.projection.bias)
            return F.logsigmoid(F.linear(x.to(weight.dtype), weight, bias))
