"""Tokens in another order, and back."""

import torch
from torch import Tensor


class _Reorder(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x, order, inverse):
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *orders = inputs
        ctx.save_for_backward(*orders)
        ctx.save_for_forward(*orders)

    @staticmethod
    def backward(ctx, grad):
        order, inverse = ctx.saved_tensors
        return reorder(grad, inverse, order), None, None


class _ReorderForwardMode(_Reorder):
    @staticmethod
    def jvp(ctx, tangent, *_):
        order, inverse = ctx.saved_tensors
        return reorder(tangent, order, inverse)


def reorder(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[:, order]``, whose gradient is read through the inverse order: no sum over places that could be the same, as of an index."""
    # a compiler takes no function with a derivative of forward mode
    return (_Reorder if torch.compiler.is_compiling() else _ReorderForwardMode).apply(x, order, inverse)


def inverse_of(order: Tensor) -> Tensor:
    """The order that undoes ``order``, (L,) int64."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
