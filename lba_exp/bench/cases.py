"""One case of a benchmark: its sizes, its inputs, and the calls that are measured on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lba_exp import ops
from lba_exp.bench import fla
from lba_exp.bench.settings import Settings

SOFTMAX = "softmax"  # scaled_dot_product_attention, measured beside the forms
COPY = "copy"  # the floor: as many bytes moved as it takes to read q, k, v and to write y once
EPS = 1e-6
HORIZONS = (16.0, 1024.0)  # tokens over which the first and the last head decay by a factor e


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call of the operator."""

    decay: str
    dtype: str
    batch: int
    length: int
    settings: Settings

    @property
    def itemsize(self) -> int:
        """Bytes of a number in q, k, v."""
        return getattr(torch, self.dtype).itemsize

    @property
    def io_bytes(self) -> int:
        """Bytes of q, k, v and y together."""
        return self.itemsize * self.batch * self.length * self.settings.heads * 2 * (self.settings.key_width + self.settings.value_width)


@dataclass(frozen=True)
class Inputs:
    """q, k ``(B, L, H, Dk)``, v and ``grad`` (of the output) ``(B, L, H, Dv)`` in the case's dtype, and the log decay of each step."""

    q: Tensor
    k: Tensor
    v: Tensor
    forward_log_decay: Tensor | None
    backward_log_decay: Tensor | None
    grad: Tensor


def draw(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random inputs: q and k uniform in [0, 1) as after a positive feature map, v and the output's gradient normal.

    The heads' decays range from short to long memory (HORIZONS); selective ones vary from token to token as an exponential variable,
    those of "vector" from channel to channel as well. Forward and backward decays are those of the paper's mask (convention "key").
    """
    generator = torch.Generator(device).manual_seed(seed)
    s, dtype = case.settings, getattr(torch, case.dtype)
    shape = (case.batch, case.length, s.heads)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device).to(dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    q, k = uniform(*shape, s.key_width), uniform(*shape, s.key_width)
    v, grad = normal(*shape, s.value_width), normal(*shape, s.value_width)
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    first, last = (-math.log(tokens) for tokens in HORIZONS)
    rate = torch.linspace(first, last, s.heads, device=device, dtype=gate_dtype).exp()
    if case.decay == "none":
        gate = None
    elif case.decay == "fixed":
        gate = -rate
    else:
        channels = (s.key_width,) if case.decay == "vector" else ()
        noise = torch.empty(*shape, *channels, device=device, dtype=gate_dtype).exponential_(generator=generator)
        gate = -noise * (rate[:, None] if channels else rate)
    forward, backward = ops.step_log_decays(gate, "key")
    return Inputs(q, k, v, forward, backward, grad)


def call(contender: str, case: Case, inputs: Inputs, backward: bool, denominator: str | None = None) -> Callable[[], Tensor]:
    """A function without arguments that runs one contender on the inputs and returns its output.

    Args:
        contender: a form of the operator; one of ``fla.NAMES``; SOFTMAX, whose inputs and output are ``(B, H, L, D)``, contiguous, as its
            kernels like best; or COPY, a copy of half of ``case.io_bytes``, which reads that many bytes and writes as many, in each pass.
        backward: also take the gradients of q, k, v and both decays.
        denominator: how ``fla-x2`` divides, see ``fla.DENOMINATORS``.
    """
    if contender == COPY:
        source = torch.ones(case.io_bytes // 2, dtype=torch.uint8, device=inputs.q.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    tensors, grad = [inputs.q, inputs.k, inputs.v, inputs.forward_log_decay, inputs.backward_log_decay], inputs.grad
    if contender == SOFTMAX:
        tensors = [x.transpose(1, 2).contiguous() for x in tensors[:3]]
        grad = grad.transpose(1, 2).contiguous()
    function = _function(contender, case, denominator)

    def forward_alone() -> Tensor:
        with torch.no_grad():
            return function(*tensors)

    if not backward:
        return forward_alone
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    wanted = [x for x in leaves if x is not None]

    def forward_and_backward() -> Tensor:
        y = function(*leaves)
        torch.autograd.grad(y, wanted, grad, allow_unused=True)  # direction "forward" does not use the backward decay
        return y.detach()

    return forward_and_backward


def _function(contender: str, case: Case, denominator: str | None) -> Callable[..., Tensor]:
    """q, k, v and both decays, or q, k, v alone for SOFTMAX -> output."""
    s = case.settings
    if contender == SOFTMAX:
        return torch.nn.functional.scaled_dot_product_attention

    def form(*xs: Tensor | None) -> Tensor:
        return ops.bidirectional_linear_attention(
            *xs, scaled=s.scaled, direction=s.direction, form=contender, chunk_size=s.chunk_size, eps=EPS
        )

    def theirs(q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None) -> Tensor:
        fla.check(contender, q, forward, backward, s.direction)
        if contender == fla.ONCE:
            return fla.causal(q, k, v, forward)
        return fla.both_directions(q, k, v, forward, backward, denominator, EPS)

    return theirs if contender in fla.NAMES else form


def choose_denominator(contender: str, case: Case, inputs: Inputs) -> str | None:
    """How ``fla-x2`` divides in this case; None for the other contenders and where nothing is divided."""
    if contender != fla.TWICE or not case.settings.scaled:
        return None
    fla.check(contender, inputs.q, inputs.forward_log_decay, inputs.backward_log_decay, case.settings.direction)
    decays = inputs.forward_log_decay is not None
    return fla.quickest_denominator(lambda way: call(contender, case, inputs, False, way), decays, inputs.q.device)


def needed_bytes(contender: str, case: Case, backward: bool, device: torch.device) -> int:
    """An estimate of a contender's working memory, ``ops.estimate_bytes`` with what a backward pass adds.

    Measured on a CPU at L = 1,024 against the forward estimate: with gradients, "recurrent" takes up to 2.4 times as much, "chunkwise" and
    "parallel" up to 1.3 times; "blockwise" keeps every block for autograd, about what "parallel" takes. Softmax attention writes its
    L x L matrices where the widths differ, else no more than its output; on CUDA it is let try, and so is flash-linear-attention.
    """
    s = case.settings
    if contender in (*fla.NAMES, COPY):
        return 0
    if contender == SOFTMAX:
        matrices = 2 * case.batch * s.heads * case.length**2 * case.itemsize * (2 if backward else 1)
        return matrices if device.type == "cpu" and s.key_width != s.value_width else 0
    form = "parallel" if contender == "blockwise" and backward else contender
    estimate = ops.estimate_bytes(form, case.batch, case.length, s.heads, s.key_width, s.value_width, itemsize=case.itemsize)
    return int(estimate * (1.0 if not backward else 1.3 if form == "parallel" else 2.4))
