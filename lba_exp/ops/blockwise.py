"""The paper's chunk form (arXiv 2502.16249): a loop over all pairs of chunks, O(L C) memory but O(L^2) work. For comparison only."""

import torch
from torch import Tensor

from lba_exp.ops.channels import decayed, pad_tokens
from lba_exp.ops.decays import LOWEST, sums_inside
from lba_exp.ops.inside import inside_scores, is_vector
from lba_exp.ops.precision import compute_dtype


def _cut(x: Tensor | None, length: int, size: int) -> list[Tensor | None]:
    """``(B, L, H, D)`` as a list of ``(B, H, size, D)``, zeros after the end; what is the same in every step is repeated."""
    count = -(-length // size)
    if x is None:
        return [None] * count
    x = x.expand(-1, length, -1, -1).transpose(1, 2)
    return list(pad_tokens(x, count * size).split(size, dim=2))


def blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward: Tensor | None,
    backward: Tensor | None,
    *,
    weight: float,
    directions: tuple[str, ...],
    with_den: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Numerator ``(B, L, H, Dv)`` and denominator ``(B, L, H)``, chunk pair by chunk pair; training keeps every pair's scores.

    Arguments as in ``parallel``. With a decay per channel the chunk is rounded up to a power of two.
    """
    length, dtype = q.shape[1], compute_dtype(q, k, v)
    size = min(chunk_size, length)
    if is_vector(forward, backward):
        size = 2 ** (size - 1).bit_length()
    qs, ks, vs = (_cut(x.to(dtype), length, size) for x in (q, k, v))
    steps = {}
    for direction, x in (("forward", forward), ("backward", backward)):
        if direction in directions:
            cut = _cut(None if x is None else x.clamp_min(LOWEST), length, size)
            steps[direction] = [(None, None, None) if y is None else sums_inside(y, direction == "backward") for y in cut]
    own_steps = zip(*(_cut(None if x is None else x.clamp_min(LOWEST), length, size) for x in (forward, backward)), strict=True)
    nums, dens = [], []
    for i, own in enumerate(own_steps):
        scores = inside_scores(qs[i], ks[i], *own, weight, directions)
        num, den = scores @ vs[i], scores.sum(-1)
        for direction, sums in steps.items():
            query = decayed(qs[i], sums[i][0])
            gap = None  # the log decay over the chunks between the two
            for j in range(i - 1, -1, -1) if direction == "forward" else range(i + 1, len(ks)):
                key = decayed(decayed(ks[j], sums[j][1]), gap)
                scores = query @ key.mT
                num, den = num + scores @ vs[j], den + scores.sum(-1)
                gap = sums[j][2] if gap is None else gap + sums[j][2]
        nums.append(num)
        dens.append(den)
    num = torch.cat(nums, dim=2)[:, :, :length].transpose(1, 2)
    return num, torch.cat(dens, dim=2)[:, :, :length].transpose(1, 2) if with_den else None
