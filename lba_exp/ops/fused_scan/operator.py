"""The fused selective scan as an operation of torch, opaque to a compiler: ``lba_exp::selective_scan`` and its backward pass."""

import torch
from torch import Tensor

from lba_exp.ops.fused.operator import DTYPES, HAS_TRITON, INTERPRETED
from lba_exp.ops.precision import compute_dtype, first_derivative, no_forward_mode

LARGEST_STATE = 64
CHUNK = 16  # tokens between the states that the forward pass keeps for the backward pass


def selective_scan_obstacle(device: torch.device, dtype: torch.dtype, state: int) -> str | None:
    """Why the fused form cannot run on such inputs, and what to do, in a sentence; None where it can. ``state``: N."""
    advice = "use 'chunkwise' or 'auto'"
    if dtype not in DTYPES:
        return f"form: 'fused' takes float32, bfloat16 and float16, got {dtype}; {advice}"
    if state > LARGEST_STATE or state & (state - 1):
        return f"form: 'fused' takes states of 1, 2, 4, ... {LARGEST_STATE} numbers, got {state}; {advice}"
    if device.type == "meta":
        return None
    if not HAS_TRITON:
        return f"form: 'fused' needs Triton, which is not installed (pip install triton); {advice}"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"form: 'fused' runs on CUDA devices (elsewhere in Triton's interpreter alone, TRITON_INTERPRET=1), got {device}; {advice}"
    return None


@torch.library.custom_op("lba_exp::selective_scan", mutates_args=())
def _forward(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, mask: Tensor | None, backward: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    from lba_exp.ops.fused_scan import launch

    return launch.forward(x, delta, a, b, c, mask, backward, keep)


def border_shape(x: Tensor, state: int, keep: bool) -> tuple[int, ...]:
    """Of the states that enter each chunk but the first, (B, chunks - 1, N, D)."""
    chunks = (x.shape[1] + CHUNK - 1) // CHUNK
    return (x.shape[0], chunks - 1, state, x.shape[2]) if keep else (0,)


@_forward.register_fake
def _(x, delta, a, b, c, mask, backward, keep):
    return x.new_empty(x.shape), a.new_empty(border_shape(x, a.shape[1], keep))


@torch.library.custom_op("lba_exp::selective_scan_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, mask: Tensor | None, borders: Tensor, backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from lba_exp.ops.fused_scan import launch

    return launch.backward(grad, x, delta, a, b, c, mask, borders, backward)


@_backward.register_fake
def _(grad, x, delta, a, b, c, mask, borders, backward):
    return tuple(y.new_empty(y.shape) for y in (x, delta, a, b, c))


def _keep(ctx, inputs, output):
    x, delta, a, b, c, mask, ctx.backward, _ = inputs
    ctx.save_for_backward(x, delta, a, b, c, mask, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@first_derivative
def _gradients(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    x, delta, a, b, c, mask, borders = ctx.saved_tensors
    return *_backward(grad, x, delta, a, b, c, mask, borders, ctx.backward), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def fused_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, mask: Tensor | None, backward: bool) -> Tensor:
    """GPU kernels of the selective scan: O(L D N) work, and nothing of size L D N in memory.

    One program walks a block of channels of a sequence from end to end, its states in registers, so that a few long sequences leave a GPU
    partly idle. Kept for the backward pass: the inputs, and a state every 16 tokens, from which those in between are made again.

    x: ``(B, L, D)``, b, c: ``(B, L, N)``, float32 or half precision; delta: ``(B, L, D)`` and a: ``(D, N)`` float32; ``mask``: bool ``(B,
    L)``, True = real token; ``backward``: from the last token on. All sums are float32. Returns ``(B, L, D)`` in the dtype of x; raises
    ValueError where it cannot run (``selective_scan_obstacle``), RuntimeError for derivatives beyond the first and forward-mode ones.
    """
    if reason := selective_scan_obstacle(x.device, compute_dtype(x, delta, a, b, c), a.shape[1]):
        raise ValueError(reason)
    no_forward_mode(x, delta, a, b, c)
    keep = torch.is_grad_enabled() and any(y.requires_grad for y in (x, delta, a, b, c))
    return _forward(x, delta.float(), a.float(), b, c, mask, backward, keep)[0]
