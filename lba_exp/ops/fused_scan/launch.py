"""How the kernels of the selective scan are launched."""

import torch
from torch import Tensor

from lba_exp.ops.fused_scan.kernels import backward_kernel, forward_kernel
from lba_exp.ops.fused_scan.operator import CHUNK, border_shape

CHANNELS = 32  # of a program: one a lane


def _warps(state: int) -> int:
    """Warps of a program: 16 numbers of a channel's state are what a thread can hold beside their gradients."""
    return max(1, state // 16)


def _numbers(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _mask(mask: Tensor | None, other: Tensor) -> Tensor:
    """The mask in one piece, as the kernels read it: it may be one row, expanded over the sequences. None: ``other``, which is not read."""
    return other if mask is None else mask.contiguous()


def forward(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, mask: Tensor | None, backward: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """y, and the states that enter each chunk but the first, or nothing."""
    x, delta, a, b, c = (t.contiguous() for t in (x, delta, a, b, c))
    batch, length, channels = x.shape
    state = a.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    borders = _numbers(x, *border_shape(x, state, keep))
    forward_kernel[(batch, -(-channels // CHANNELS))](
        x, delta, a, b, c, _mask(mask, x), y, borders, length, channels,
        N=state, BLOCK=CHANNELS, CHUNK=CHUNK, MASKED=mask is not None, BACKWARD=backward, KEEP=keep, num_warps=_warps(state),
    )  # fmt: skip
    return y, borders


def backward(
    grad: Tensor, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, mask: Tensor | None, borders: Tensor, backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, a, b, c, in their shapes and dtypes."""
    grad, x, delta, a, b, c = (t.contiguous() for t in (grad, x, delta, a, b, c))
    batch, length, channels = x.shape
    state, blocks = a.shape[1], -(-channels // CHANNELS)
    dx, ddelta = torch.empty(x.shape, dtype=x.dtype, device=x.device), _numbers(x, *delta.shape)
    # sums over sequences, and over blocks of channels: in a fixed order, by torch
    da = _numbers(x, batch, channels, state)
    db, dc = (_numbers(x, blocks, batch, length, state) for _ in range(2))
    states = _numbers(x, batch, blocks, CHUNK, state, CHANNELS)
    backward_kernel[(batch, blocks)](
        grad, x, delta, a, b, c, _mask(mask, x), borders, states, dx, ddelta, da, db, dc, length, channels, blocks,
        N=state, BLOCK=CHANNELS, CHUNK=CHUNK, MASKED=mask is not None, BACKWARD=backward, num_warps=_warps(state),
    )  # fmt: skip
    return dx, ddelta, da.sum(0), db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype)
