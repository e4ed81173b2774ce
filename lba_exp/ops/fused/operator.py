"""The fused form as an operation of torch: for autograd, torch.compile, torch.export and shapes without numbers.

Two operations, ``lba_exp::fused_forward`` and ``lba_exp::fused_backward``, opaque to a compiler and free of side effects; ``launch.py``,
and Triton with it, is imported where one first runs. Kept for the backward pass: q, k, v, the log decays, the padding mask and, where the
output is divided, the output and the denominator; the states are made again.
"""

import importlib.util
import os

import torch
from torch import Tensor

from lba_exp.ops.precision import first_derivative, no_forward_mode

WIDEST = 128  # of keys or values: a state of 128 x 128 is what a program can hold
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None
# as Triton reads it, once, when the kernels are first imported
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def obstacle(device: torch.device, dtype: torch.dtype, vector: bool, key_width: int, value_width: int) -> str | None:
    """Why the fused form cannot run on such inputs, and what to do, in a sentence; None where it can.

    ``dtype``: the widest of q, k, v; ``vector``: whether a decay has one value per channel.
    """
    advice = "use 'chunkwise' or 'auto'"
    if vector:
        return f"form: 'fused' has one decay per head, not one per channel; {advice}"
    if dtype not in DTYPES:
        return f"form: 'fused' takes float32, bfloat16 and float16, got {dtype}; {advice}"
    if max(key_width, value_width) > WIDEST:
        return f"form: 'fused' takes widths Dk and Dv up to {WIDEST}, got {key_width} and {value_width}; {advice}"
    if device.type == "meta":
        return None
    if not HAS_TRITON:
        return f"form: 'fused' needs Triton, which is not installed (pip install triton); {advice}"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"form: 'fused' runs on CUDA devices (elsewhere in Triton's interpreter alone, TRITON_INTERPRET=1), got {device}; {advice}"
    return None


@torch.library.custom_op("lba_exp::fused_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, g: Tensor | None, mask: Tensor | None, order: Tensor | None,
    weight: float, forward: bool, backward: bool, scaled: bool, divided: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from lba_exp.ops.fused import launch

    return launch.forward(q, k, v, f, g, mask, order, launch.Call(weight, forward, backward, scaled, divided, eps))


@_forward.register_fake
def _(q, k, v, f, g, mask, order, weight, forward, backward, scaled, divided, eps):
    batch, length, heads, _ = q.shape
    out = v.new_empty(v.shape, dtype=torch.float32 if scaled and not divided else v.dtype)
    return out, v.new_empty((batch, heads, length) if scaled else (0,), dtype=torch.float32)


@torch.library.custom_op("lba_exp::fused_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, g: Tensor | None, mask: Tensor | None, order: Tensor | None,
    out: Tensor | None, den: Tensor | None, grad: Tensor, grad_den: Tensor | None, need_f: bool, need_g: bool,
    weight: float, forward: bool, backward: bool, scaled: bool, divided: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and of the log decays, each step's (B, H, L) or a fixed one's (H,) in float64, empty where not needed."""
    from lba_exp.ops.fused import launch

    call = launch.Call(weight, forward, backward, scaled, divided, eps)
    # without a division nothing reads the output and the denominator
    out, den = (grad if x is None else x for x in (out, den))
    *grads, df, dg = launch.backward(q, k, v, f, g, mask, order, call, out, den, grad, grad_den, (need_f, need_g))
    return *grads, *(no_gradient(q) if x is None else x for x in (df, dg))


@_backward.register_fake
def _(q, k, v, f, g, mask, order, out, den, grad, grad_den, need_f, need_g, weight, forward, backward, scaled, divided, eps):
    steps = [empty_gradient(q, x) if need else no_gradient(q) for x, need in ((f, need_f), (g, need_g))]
    return *(x.new_empty(x.shape) for x in (q, k, v)), *steps


def no_gradient(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.float32)


def empty_gradient(q: Tensor, decay: Tensor, scans: tuple[int, ...] = ()) -> Tensor:
    """Room for the gradient of a log decay as ``launch`` gives it: of each step or of a fixed one; ``scans``: (S,) for so many, stacked."""
    batch, length, heads, _ = q.shape
    if decay.ndim - len(scans) == 1:
        return q.new_empty((*scans, heads), dtype=torch.float64)
    return q.new_empty((*scans, batch, heads, length), dtype=torch.float32)


def _keep(ctx, inputs, output):
    q, k, v, f, g, mask, order, *ctx.options = inputs
    *_, divided, _ = ctx.options
    ctx.save_for_backward(q, k, v, f, g, mask, order, *(output if divided else (None, None)))
    ctx.set_materialize_grads(False)


@first_derivative
def _gradients(ctx, grad, grad_den):
    q, k, v, f, g, mask, order, out, den = ctx.saved_tensors
    _, forward, backward, scaled, divided, _ = ctx.options
    if grad is None and (grad_den is None or divided):
        return (None,) * 13
    parts = scaled and not divided
    if grad is None:
        grad = v.new_zeros(v.shape, dtype=torch.float32)
    if not parts:
        grad_den = None
    elif grad_den is None:
        grad_den = grad.new_zeros(q.shape[0], q.shape[2], q.shape[1])
    needs = [x is not None and needed for x, needed in zip((f, g), ctx.needs_input_grad[3:5], strict=True)]
    needs = [needs[0] and forward, needs[1] and backward]
    *grads, df, dg = _backward(q, k, v, f, g, mask, order, out, den, grad, grad_den, *needs, *ctx.options)
    return *grads, *decay_gradients((f, g), (df, dg), needs), *(None,) * 8


def decay_gradients(decays, gradients, needs) -> list[Tensor | None]:
    """Gradients of log decays in their own shape and dtype, from those that ``launch`` gives, of one scan or of several."""
    pairs = zip(decays, gradients, needs, strict=True)
    return [None if not need else dx.to(x.dtype) if dx.dtype == torch.float64 else dx.mT for x, dx, need in pairs]


_forward.register_autograd(_gradients, setup_context=_keep)


def ready(q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None, *, vector: bool) -> tuple[Tensor, ...]:
    """q, k, v in their widest dtype; ValueError or RuntimeError where the kernels cannot run on them, or on such decays."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if reason := obstacle(q.device, dtype, vector, q.shape[-1], v.shape[-1]):
        raise ValueError(reason)
    no_forward_mode(q, k, v, forward, backward)
    return tuple(x.to(dtype) for x in (q, k, v))


def fused(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None, mask: Tensor | None, order: Tensor | None, *,
    weight: float, directions: tuple[str, ...], scaled: bool, eps: float | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """GPU kernels of the chunkwise form: O(L d^2) work, and outputs, denominators and gradients are all that is written for every token.

    q, k: ``(B, L, H, Dk)``; v: ``(B, L, H, Dv)``; any strides, on a GPU; computed in the widest of their dtypes: float32 in float32 (TF32
        where ``torch.set_float32_matmul_precision`` allows it), half precision in bfloat16 products with float32 sums.
    forward, backward: log decays, None, ``(H,)`` or ``(B, L, H)``, float32; ``mask``: bool ``(B, L)``, True = real token.
    order: int64 ``(L,)`` or None, the tokens as they are read; the decays are in that order, all else is not.
    scaled, eps: with both ``scaled`` and an ``eps``, the output is num / (den + eps).

    Returns (y or num in the widest dtype, None); or, scaled without ``eps``, (num, den ``(B, L, H)``), both float32. Raises ValueError
    where it cannot run (``obstacle``), RuntimeError for derivatives beyond the first and for forward-mode ones.
    """
    q, k, v = ready(q, k, v, forward, backward, vector=any(x is not None and x.ndim in (2, 4) for x in (forward, backward)))
    divided = scaled and eps is not None
    read = ("forward" in directions, "backward" in directions)
    out, den = _forward(q, k, v, forward, backward, mask, order, weight, *read, scaled, divided, eps if divided else 0.0)
    return (out, den.transpose(1, 2)) if scaled and not divided else (out, None)
