"""What the ranks of a process group hold, brought together with gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(out.unbind(0)), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` of every rank, ``(ranks, *x.shape)``; its gradient is summed over the ranks.

    Every rank calls, and every rank's result has to depend on what comes back, be it on none of its numbers (``gathered[:0].sum()``): a
    backward pass that does not come by here leaves the others waiting.
    """
    return _Gather.apply(x, group)


def check_group(group: dist.ProcessGroup) -> None:
    """Raises ValueError where this process is not in the group, or there is none."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("sequence_group: torch.distributed is not initialised; call torch.distributed.init_process_group, or give None")
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError("sequence_group: expected a process group that this process is in, or None")
