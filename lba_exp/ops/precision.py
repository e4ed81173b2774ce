"""In which dtype the work is done, and what a backward pass of our own must hold to."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of the tensors is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager:
    """The dtypes that the code asks for, whatever a caller's ``torch.autocast`` says."""
    # a device without autocast, such as meta, takes the CPU's, which it does not look at; torch 2.11 compiles no question about that
    known = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    kind = device.type if known else "cpu"
    if torch.compiler.is_exporting() and not torch.is_autocast_enabled(kind):
        return nullcontext()  # an exported graph would hold the region as a graph of its own
    return torch.autocast(kind, enabled=False)


def first_derivative(backward: Callable) -> Callable:
    """For the backward of an operation: without autocast, and a clear error where a derivative of it is asked for.

    ``once_differentiable`` would leave such a derivative out in silence where ``torch.autograd.grad`` names its inputs.
    """

    @functools.wraps(backward)
    def run(ctx, grad, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the recurrent, chunkwise and fused forms, and any with a sequence_group, have first derivatives only, so no "
                "create_graph=True; "
                "form='parallel' has higher ones"
            )
        device = next(x.device for x in (grad, *grads) if x is not None)
        with no_autocast(device):
            return backward(ctx, grad, *grads)

    return run


def no_forward_mode(*tensors: Tensor | None) -> None:
    """Raise where an input carries a forward-mode tangent: an opaque operation would drop it, and the derivative would read as zero."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("the recurrent and fused forms and streaming have no forward-mode derivatives (jvp); form='parallel' has them")
