"""In which dtype the work is done."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of the tensors is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def without_autocast(backward: Callable) -> Callable:
    """For the backward of an autograd function: the dtypes it asks for, also where a caller runs it under ``torch.autocast``."""

    @functools.wraps(backward)
    def run(ctx, grad, *grads):
        with torch.autocast(device_type=grad.device.type, enabled=False):
            return backward(ctx, grad, *grads)

    return run
