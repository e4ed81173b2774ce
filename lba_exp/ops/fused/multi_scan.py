"""Several scans of the same tokens in one operation of torch: their numerators and denominators meet inside the kernels.

``lba_exp::fused_scans_forward`` and ``lba_exp::fused_scans_backward``, as in ``operator.py``. Kept for the backward pass: q, k, v, the log
decays, the padding mask, the output and the denominator; a numerator lives from one scan's kernel to the next.
"""

import torch
from torch import Tensor

from lba_exp.ops.fused.operator import decay_gradients, empty_gradient, no_gradient, ready
from lba_exp.ops.precision import first_derivative


@torch.library.custom_op("lba_exp::fused_scans_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, g: Tensor | None, mask: Tensor | None, orders: Tensor,
    weight: float, forward: bool, backward: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from lba_exp.ops.fused import launch

    return launch.forward_scans(q, k, v, f, g, mask, orders, launch.Call(weight, forward, backward, True, True, eps))


@_forward.register_fake
def _(q, k, v, f, g, mask, orders, weight, forward, backward, eps):
    batch, length, heads, _ = q.shape
    return v.new_empty(v.shape), v.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("lba_exp::fused_scans_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, g: Tensor | None, mask: Tensor | None, orders: Tensor,
    out: Tensor, den: Tensor, grad: Tensor, need_f: bool, need_g: bool,
    weight: float, forward: bool, backward: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and of the log decays, each step's (S, B, H, L) or fixed ones' (S, H) in float64, empty where not needed."""
    from lba_exp.ops.fused import launch

    call = launch.Call(weight, forward, backward, True, True, eps)
    *grads, df, dg = launch.backward_scans(q, k, v, f, g, mask, orders, call, out, den, grad, (need_f, need_g))
    return *grads, *(no_gradient(q) if x is None else x for x in (df, dg))


@_backward.register_fake
def _(q, k, v, f, g, mask, orders, out, den, grad, need_f, need_g, weight, forward, backward, eps):
    scans = (orders.shape[0],)
    steps = [empty_gradient(q, x, scans) if need else no_gradient(q) for x, need in ((f, need_f), (g, need_g))]
    return *(x.new_empty(x.shape) for x in (q, k, v)), *steps


def _keep(ctx, inputs, output):
    q, k, v, f, g, mask, orders, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, f, g, mask, orders, *output)
    ctx.set_materialize_grads(False)


@first_derivative
def _gradients(ctx, grad, _):
    q, k, v, f, g, mask, orders, out, den = ctx.saved_tensors
    if grad is None:
        return (None,) * 11
    needs = [x is not None and needed for x, needed in zip((f, g), ctx.needs_input_grad[3:5], strict=True)]
    *grads, df, dg = _backward(q, k, v, f, g, mask, orders, out, den, grad, *needs, *ctx.options)
    return *grads, *decay_gradients((f, g), (df, dg), needs), *(None,) * 6


_forward.register_autograd(_gradients, setup_context=_keep)


def fused_scans(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None, mask: Tensor | None, orders: Tensor, *,
    weight: float, directions: tuple[str, ...], eps: float,
) -> Tensor:  # fmt: skip
    """Mean of the scans' numerators over the mean of their denominators plus ``eps``: (B, L, H, Dv) in the widest dtype of q, k, v.

    Arguments as of ``fused``, but for forward, backward: None, ``(S, H)`` or ``(S, B, L, H)``, None where that direction is not read; and
    orders: int64 ``(S, L)``. Raises as it does.
    """
    q, k, v = ready(q, k, v, forward, backward, vector=any(x is not None and x.ndim in (3, 5) for x in (forward, backward)))
    read = ("forward" in directions, "backward" in directions)
    return _forward(q, k, v, forward, backward, mask, orders, weight, *read, eps)[0]
