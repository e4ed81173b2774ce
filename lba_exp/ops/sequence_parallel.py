"""Sequence parallelism: a sequence cut into consecutive blocks, one a rank of a process group, each rank with its own tokens alone.

What a rank knows of the others is one state per direction: the sum of k v^T over a block, decayed to the block's border, and the block's
whole decay. One all-gather of these brings them together, whatever the length: B H (Dk (Dv + 1) + X) numbers a direction and rank, X being
1 or Dk. The states that enter a block then read like those of a chunk. The backward pass sends as much in one all-reduce. All is linear in
the rank's own tokens, and exact: the sums are those of one device in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import pad

from lba_exp.ops.channels import decayed
from lba_exp.ops.decays import LOWEST, sums_inside
from lba_exp.ops.precision import compute_dtype
from lba_exp.ops.ranks import gather


def from_other_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward: Tensor | None,
    backward: Tensor | None,
    *,
    directions: tuple[str, ...],
    with_den: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor | None]:
    """What the tokens of other ranks add to the numerator ``(B, L, H, Dv)`` and the denominator ``(B, L, H)`` of this rank's tokens.

    q, k, v: this rank's tokens, zero where padded; forward, backward: step decays ``(B or 1, L or 1, H, X)``. B, H, Dk, Dv, the dtype and
    the kinds of decay are the same on every rank, L need not be.
    """
    dtype = compute_dtype(q, k, v)
    batch, length, heads, _ = q.shape
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    if with_den:
        v = pad(v, (0, 1), value=1.0)
    reads, sent = [], []
    for direction in directions:
        steps = backward if direction == "backward" else forward
        into, onto, whole = _sums(steps, batch, length, direction == "backward", dtype)
        own = decayed(k, onto).mT @ v
        # a block without decay keeps states as they are
        whole = own.new_zeros(batch, heads, 1, 1) if whole is None else whole.expand(batch, -1, -1, -1)
        reads.append(decayed(q, into))
        sent += [own, whole]
    gathered = gather(torch.cat([x.flatten() for x in sent]), group)
    gathered = [x.view(-1, *y.shape) for x, y in zip(gathered.split([x.numel() for x in sent], dim=1), sent, strict=True)]
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    total = 0.0
    for number, direction in enumerate(directions):
        others = range(ranks - 1, rank, -1) if direction == "backward" else range(rank)
        own, whole = gathered[2 * number : 2 * number + 2]
        state = own[:0].sum(0)  # zeros that hang on what was gathered: every rank takes part in the backward pass
        for other in others:
            state = state * whole[other].exp().mT + own[other]
        total = total + reads[number] @ state
    total = total.transpose(1, 2)
    return (total[..., :-1], total[..., -1]) if with_den else (total, None)


def _sums(steps: Tensor | None, batch: int, length: int, reverse: bool, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """``sums_inside`` of a whole block, ``(B or 1, H, L, X)``, summed in float64: a block may be long."""
    if steps is None:
        return None, None, None
    steps = steps.clamp_min(LOWEST).double().expand(-1, length, -1, -1).transpose(1, 2)
    return tuple(x.to(dtype) for x in sums_inside(steps, reverse))
