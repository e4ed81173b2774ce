"""The recurrence between chunks, S_c = exp(t_{c-1}) S_{c-1} + U_{c-1}: levels of matrix products instead of a loop over chunks."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lba_exp.ops.decays import LOWEST, between

GROUP = 32  # chunks joined by one matrix product
SLICE_ELEMENTS = 2**20  # elements of the states that eager mode works on at once
GPU_SLICE_ELEMENTS = 2**26  # the same on a GPU


def rounded(count: int) -> int:
    """The number of chunks that ``scan_states`` wants room for: whole groups, where there is more than one."""
    return count if count <= GROUP else (count + GROUP - 1) // GROUP * GROUP


def scan_states(own: Tensor, log_total: Tensor | None, reverse: bool) -> Tensor:
    """The states that enter each chunk, ``(B, H, N, Dk, Dv)``, from what each adds, ``own (B, H, N, Dk, Dv)``, which is overwritten.

    log_total: ``(B or 1, H, n, 1, X)`` with n = N, fewer (the rest is padding, whose ``own`` is 0) or 1 (the same for all), the log decay
    over each whole chunk; None = no decay. ``reverse``: chunks are read from the last to the first. Groups of chunks are joined by one
    product with their matrix of decays; the groups' own sums are then the same recurrence, so the work is linear in N and the depth its
    logarithm.
    """
    count = own.shape[2]
    if log_total is None:
        log_total = own.new_zeros(1, 1, 1, 1, 1)
    total = log_total[..., 0, :].transpose(-1, -2)  # (B, H, X, n)
    total = total.expand(-1, -1, -1, count) if total.shape[-1] == 1 else pad(total, (0, count - total.shape[-1]))
    # a decay per channel: channels become a dimension of the batch
    x = own.flatten(3)[:, :, None] if total.shape[2] == 1 else own.transpose(2, 3)
    _scan(x, total, reverse)
    return own


def border_decays(steps: Tensor, size: int, reverse: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The decays within groups of positions, from their log decays ``(..., size)``: what each position's own enters each of them with,
    ``(..., size, size)``, and the whole group's end, ``(..., 1, size)``, and what enters the group enters them with, ``(..., size, 1)``."""
    # to each of size + 1 borders, from the group's first border (column 0) and from the end of each position
    decays = between(pad(steps.flip(-1) if reverse else steps, (1, 0)), size + 1, dtype).tril().exp().tril()
    inner, whole, carry = decays[..., :size, 1:], decays[..., size:, 1:], decays[..., :size, :1]
    return (inner.flip(-2, -1), whole.flip(-1), carry.flip(-2)) if reverse else (inner, whole, carry)


def _scan(own: Tensor, total: Tensor, reverse: bool) -> Tensor:
    """own ``(B, H, X, N, E)``, total ``(B or 1, H or 1, X, N)``: overwrites own with what enters each position, and returns it."""
    count = own.shape[3]
    size = GROUP if count > GROUP else count
    groups = (count + size - 1) // size
    missing = groups * size - count
    if missing:
        own, total = pad(own, (0, 0, 0, missing)), pad(total, (0, missing))
    grouped, total = own.unflatten(3, (groups, size)), total.unflatten(3, (groups, size))
    step = groups
    if not torch.compiler.is_compiling():
        elements = SLICE_ELEMENTS if own.device.type == "cpu" else GPU_SLICE_ELEMENTS
        step = max(1, elements * groups // own.numel())
    sums, carries = [], []
    for first in range(0, groups, step):
        part, steps = grouped[:, :, :, first : first + step], total[:, :, :, first : first + step]
        inner, whole, carry = border_decays(steps, size, reverse, own.dtype)
        if groups > 1:
            sums.append((whole @ part)[..., 0, :])
            carries.append(carry.clone())
        part.copy_(inner @ part)
    if groups > 1:
        entering = _scan(torch.cat(sums, dim=3), total.sum(-1).clamp_min(LOWEST), reverse)
        grouped.addcmul_(torch.cat(carries, dim=3), entering[..., None, :])
    return own[:, :, :, :count]
