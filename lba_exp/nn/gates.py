"""Gates: modules that give each token its decay lambda, as log lambda (arXiv 2502.16249, LION-LIT, LION-D and LION-S).

A gate is built as ``Gate(width, heads, init)`` and called with the mixer's input, (B, L, width), and returns what
``lba_exp.ops.step_log_decays`` takes: None; a decay per head, (heads,) or (B, L, heads); or one per key channel, (heads, Dk) or
(B, L, heads, Dk), Dk = width / heads. It is never above 0 (but for ``SoftplusVectorGate``), and in float32 (float64 for float64 parameters)
under every precision and autocast: decays are multiplied over hundreds of tokens, and so are their rounding errors. (The products W x of
a ``SelectiveGate`` alone are rounded, as queries and keys are, and differently for each token; the bias, which all share, is not.)

Every decay is lambda = sigmoid(logit), or a root of that, so that log lambda = -softplus(-logit) is negative by construction and has finite
gradients however far the gate saturates. An initialisation chooses the logits:

``"timescales"``: a memory of T = 1 / (1 - lambda) tokens, log-spaced from 4 (a neighbourhood) to 256 (all of a short sequence; and after
    1,024 tokens still e^-4, so that the slowest head carries a signal across sequences of 64 to 1,024 tokens): over the heads, or, for a
    decay per channel, over the channels of each head. One head (or channel) alone gets the geometric mean, 32.
``"random"``: the paper's; lambda starts near 1/2, a memory of two tokens.
``"retnet"``: lambda = 1 - 2^(-5 - h) for head h (arXiv 2307.08621, section 2.2); for a decay per head.
``"hippo"``, ``"hippo_lin"``: lambda = exp(B), B from ``lba_exp.nn.hippo``; for a decay per channel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.nn.checks import check_heads, check_positive
from lba_exp.nn.conflicts import HIPPO
from lba_exp.nn.hippo import PROJECTION_DEVIATION
from lba_exp.ops.checks import choice

SHORTEST_MEMORY = 4.0
LONGEST_MEMORY = 256.0
GLA_RANK = 16
GLA_TEMPERATURE = 16.0


def timescale_logits(number: int) -> Tensor:
    """Logits a with 1 / (1 - sigmoid(a)) log-spaced from SHORTEST_MEMORY to LONGEST_MEMORY: (number,) float32."""
    if number == 1:
        memory = torch.tensor([math.sqrt(SHORTEST_MEMORY * LONGEST_MEMORY)], dtype=torch.float64)
    else:
        memory = torch.logspace(math.log2(SHORTEST_MEMORY), math.log2(LONGEST_MEMORY), number, base=2.0, dtype=torch.float64)
    return (memory - 1).log().float()


def retnet_logits(heads: int) -> Tensor:
    """Logits of 1 - 2^(-5-h): (heads,) float32."""
    return torch.log(torch.exp2(5 + torch.arange(heads, dtype=torch.float64)) - 1).float()


def decay_logits(log_decay: Tensor) -> Tensor:
    """Logits a with log sigmoid(a) = log_decay < 0, in float32."""
    log_decay = log_decay.double()
    return (log_decay - torch.log(-torch.expm1(log_decay))).float()


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_at_least_float32(x: Tensor, projection: nn.Linear) -> Tensor:
    """The projection in float32 (float64 for float64 weights), whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        weight = at_least_float32(projection.weight)
        bias = None if projection.bias is None else at_least_float32(projection.bias)
        return F.linear(x.to(weight.dtype), weight, bias)


class Gate(nn.Module):
    """Base of all gates, those of plugins included: the optimizer exempts every parameter of its subclasses from weight decay.

    Attributes:
        initialisations: valid values of ``init``.
        expanding: lambda may exceed 1, so that the parallel form alone, without the operator's check of values, can run it.
        per_channel: one decay per key channel, not one per head.
    """

    weight_decay_exempt = True
    initialisations: tuple[str, ...] = ("timescales", "random", "retnet")
    expanding = False
    per_channel = False

    def __init__(self, width: int, heads: int, init: str = "timescales"):
        super().__init__()
        check_positive(width=width, heads=heads)
        choice("gate_init", init, self.initialisations)


class NoGate(Gate):
    """lambda = 1: no decay and no parameters (LION-LIT). Takes the arguments of the other gates; ``forward`` returns None."""

    def forward(self, x: Tensor) -> None:
        return None


def scalar_logits(heads: int, init: str) -> Tensor:
    return retnet_logits(heads) if init == "retnet" else timescale_logits(heads)


class FixedGate(Gate):
    """lambda_h = sigmoid(a_h), one learned a per head (LION-D). ``init="random"``: a ~ N(0, 1). Returns (heads,)."""

    def __init__(self, width: int, heads: int, init: str = "timescales"):
        super().__init__(width, heads, init)
        self.logit = nn.Parameter(torch.randn(heads) if init == "random" else scalar_logits(heads, init))

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(at_least_float32(self.logit))


class SelectiveGate(Gate):
    """lambda = sigmoid(W x + b), one number per token and head (LION-S). Returns (B, L, heads).

    ``init="timescales"`` and ``"retnet"``: b holds the memory lengths and W ~ N(0, 0.1^2 / width), so that on a normalised input W x has a
    deviation of 0.1 and every gate starts near its bias, with long memory. ``init="random"``: that of ``nn.Linear``.
    """

    def __init__(self, width: int, heads: int, init: str = "timescales"):
        super().__init__(width, heads, init)
        self.projection = nn.Linear(width, heads)
        if init != "random":
            nn.init.normal_(self.projection.weight, std=0.1 / math.sqrt(width))
            with torch.no_grad():
                self.projection.bias.copy_(scalar_logits(heads, init))

    def forward(self, x: Tensor) -> Tensor:
        products = F.linear(x, self.projection.weight)
        # the bias holds the memory lengths: it and all after it in at least float32
        return F.logsigmoid(at_least_float32(products) + at_least_float32(self.projection.bias))


class VectorGate(Gate):
    """Base of the gates with one decay per key channel; width / heads channels a head."""

    initialisations = ("timescales", "random", *HIPPO)
    per_channel = True

    def __init__(self, width: int, heads: int, init: str = "timescales"):
        super().__init__(width, heads, init)
        check_heads(width, heads)
        self.heads, self.key_width = heads, width // heads

    def start_logits(self, init: str, log_decay: Tensor | None) -> Tensor:
        """Logits at the start, (heads, Dk) float32, for every ``init`` but ``"random"``; ValueError where ``log_decay`` does not fit."""
        if init not in HIPPO:
            return timescale_logits(self.key_width).expand(self.heads, -1)
        expected = (self.heads, self.key_width)
        if log_decay is None or tuple(log_decay.shape) != expected:
            given = None if log_decay is None else tuple(log_decay.shape)
            raise ValueError(f"log_decay: expected shape {expected} for gate_init={init!r}, got {given}")
        return decay_logits(log_decay)


class FixedVectorGate(VectorGate):
    """lambda = sigmoid(a), one learned a per key channel: the diagonal decay of LION-D. Returns (heads, Dk).

    For Long Range Arena the paper's Lambda = exp(B): B = log sigmoid(a) is learned, starts at the HiPPO diagonal and stays below 0.

    Args:
        log_decay: (heads, Dk), below 0: B at the start, for ``init="hippo"`` and ``"hippo_lin"`` alone.
    """

    def __init__(self, width: int, heads: int, init: str = "timescales", *, log_decay: Tensor | None = None):
        super().__init__(width, heads, init)
        logits = torch.randn(heads, self.key_width) if init == "random" else self.start_logits(init, log_decay).clone()
        self.logit = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(at_least_float32(self.logit))


class SelectiveVectorGate(VectorGate):
    """lambda = sigmoid(W x + b), one number per token and key channel: the diagonal decay of LION-S. Returns (B, L, heads, Dk).

    With the HiPPO diagonal this is log lambda_i = -softplus(-(W x_i + b)), with b such that lambda = exp(B) where W x_i = 0. For the small
    |B| of long memories it is about B exp(-W x_i): the token scales its step Delta, as in selective state spaces. Unlike
    exp(sigmoid(W x) + B) it can neither exceed 1, nor lose B's timescales in a sigmoid that is a thousand times as large.

    ``init="timescales"``: W ~ N(0, 0.1^2 / width); ``"random"``: that of ``nn.Linear``; HiPPO: W ~ N(0, 0.1^2).

    Args:
        log_decay: (heads, Dk), below 0: B, for ``init="hippo"`` and ``"hippo_lin"`` alone.
    """

    def __init__(self, width: int, heads: int, init: str = "timescales", *, log_decay: Tensor | None = None):
        super().__init__(width, heads, init)
        self.projection = nn.Linear(width, width)
        if init != "random":
            nn.init.normal_(self.projection.weight, std=PROJECTION_DEVIATION if init in HIPPO else 0.1 / math.sqrt(width))
            with torch.no_grad():
                self.projection.bias.copy_(self.start_logits(init, log_decay).flatten())

    def logits(self, x: Tensor) -> Tensor:
        return linear_at_least_float32(x, self.projection).unflatten(-1, (self.heads, self.key_width))

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(self.logits(x))


class LowRankVectorGate(VectorGate):
    """lambda = sigmoid(W_2 W_1 x + b)^(1/16), one number per token and key channel (Gated Linear Attention, arXiv 2312.06635, section 4.4).

    W_1 goes to 16 features (at most the width), without a bias, as published. Returns (B, L, heads, Dk).

    The root makes memories 16 times as long as the logits alone would: with logits about 0 (``init="random"``: both projections as
    ``nn.Linear`` starts them, as published) 1 / (1 - lambda) is about 24 tokens. The other initialisations mean what they mean for
    ``SelectiveVectorGate``: b is such that lambda where W_2 W_1 x = 0 has the memory lengths, or exp(B), and W_2 W_1 x deviates as W x does
    there: by 0.1 on a normalised input, for HiPPO by 0.1 sqrt(width).

    Args:
        log_decay: (heads, Dk), below 0: B, for ``init="hippo"`` and ``"hippo_lin"`` alone.
    """

    def __init__(self, width: int, heads: int, init: str = "timescales", *, log_decay: Tensor | None = None):
        super().__init__(width, heads, init)
        rank = min(GLA_RANK, width)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width)
        if init != "random":
            deviation = PROJECTION_DEVIATION * math.sqrt(width) if init in HIPPO else 0.1
            nn.init.normal_(self.down.weight, std=width**-0.5)
            nn.init.normal_(self.up.weight, std=deviation * rank**-0.5)
            log_root = F.logsigmoid(self.start_logits(init, log_decay).double())
            with torch.no_grad():
                self.up.bias.copy_(decay_logits(GLA_TEMPERATURE * log_root).flatten())

    def forward(self, x: Tensor) -> Tensor:
        logits = linear_at_least_float32(linear_at_least_float32(x, self.down), self.up)
        return F.logsigmoid(logits).unflatten(-1, (self.heads, self.key_width)) / GLA_TEMPERATURE


class SoftplusVectorGate(SelectiveVectorGate):
    """lambda = exp(softplus(-(W x + b))), above 1: the paper's ablation [7], expected to diverge. Returns (B, L, heads, Dk) > 0.

    It starts from the same weights as ``SelectiveVectorGate``, with the sign of log lambda turned: growth where that one decays.
    """

    expanding = True

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(-self.logits(x))
