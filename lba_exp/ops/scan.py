"""The recurrence between chunks, S_c = exp(t_{c-1}) S_{c-1} + U_{c-1}: levels of matrix products instead of a loop over chunks."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lba_exp.ops.decays import LOWEST, between

GROUP = 32  # chunks joined by one matrix product


def scan_states(own: Tensor, log_total: Tensor | None, reverse: bool) -> Tensor:
    """The states that enter each chunk, ``(B, H, N, Dk, Dv)``, from what each adds, ``own (B, H, N, Dk, Dv)``.

    log_total: ``(B or 1, H, N or 1, 1, X)``, the log decay over each whole chunk; None = no decay. ``reverse``: chunks are read from the
    last to the first. Groups of chunks are joined by one product with their matrix of decays; the groups' own sums are then the same
    recurrence, so the work is linear in N and the depth its logarithm.
    """
    batch, heads, count, width, columns = own.shape
    if log_total is None:
        log_total = own.new_zeros(1, 1, 1, 1, 1)
    total = log_total[..., 0, :].transpose(-1, -2)  # (B, H, X, N)
    channels = total.shape[2]
    total = total.expand(-1, -1, -1, count)
    # a decay per channel: channels become a dimension of the batch
    x = own.view(batch, heads, 1, count, width * columns) if channels == 1 else own.transpose(2, 3)
    x = _scan(x, total, reverse)
    return x.view(batch, heads, count, width, columns) if channels == 1 else x.transpose(2, 3)


def _scan(own: Tensor, total: Tensor, reverse: bool) -> Tensor:
    """own ``(B, H, X, N, E)``, total ``(B or 1, H or 1, X, N)``: what enters each of the N positions."""
    count = own.shape[3]
    groups = -(-count // GROUP)
    size = -(-count // groups)
    missing = groups * size - count
    if missing:
        own, total = pad(own, (0, 0, 0, missing)), pad(total, (0, missing))
    own, total = own.unflatten(3, (groups, size)), total.unflatten(3, (groups, size))
    # decays to each of size + 1 borders, from the group's first border (column 0) and from the end of each position
    borders = pad(total.flip(-1) if reverse else total, (1, 0))
    decays = between(borders, own.dtype).tril().exp().tril()
    inner, carry = decays[..., 1:], decays[..., :size, 0]
    if reverse:
        inner, carry = torch.cat([inner[..., :-1, :].flip(-2, -1), inner[..., -1:, :].flip(-1)], dim=-2), carry.flip(-1)
    if groups == 1:
        return (inner[..., :size, :] @ own)[..., 0, :count, :]
    sums = inner @ own
    entering = _scan(sums[..., size, :], total.sum(-1).clamp_min(LOWEST), reverse)
    result = torch.addcmul(sums[..., :size, :], carry[..., None], entering[..., None, :])
    return result.flatten(3, 4)[..., :count, :]
