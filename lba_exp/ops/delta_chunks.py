"""The delta rule in chunks: the writes of a chunk from one triangular solve, states carried between chunks (arXiv 2406.06484, section 3).

Inside a chunk, with S the state that enters it and G_i the log decay from there to token i, a state is
S_i = exp(G_i) S + sum_{j <= i} exp(G_i - G_j) k_j u_j^T, and the writes u solve

    u_i + beta_i sum_{j < i} exp(G_i - G_j) (k_i . k_j) u_j = beta_i (v_i - exp(G_i) S^T k_i),

a unit lower triangular system whose right side is linear in S: u = u' - W S (the UT transform; with decays arXiv 2412.06464, section 3.3).
So all chunks are solved together, and each hands on transition @ S + own.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lba_exp.ops.decays import LOWEST, from_end, running_sum, sums_inside

GROUP = 32  # chunks joined one after the other, all groups of them together


class _Between(torch.autograd.Function):
    """Float64 log decays ``(..., C)`` to their sums over j < t <= i, ``(..., C, C)`` in another dtype, of use where i >= j.

    A step's gradient is what its row's and all later rows get less the same of the columns, which nearly cancel: summed in float64.
    """

    @staticmethod
    def forward(steps, dtype):
        high, low = running_sum(steps, dtype)
        return _differences(high).add_(_differences(low))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass  # linear: nothing to keep

    @staticmethod
    def backward(ctx, grad):
        sums = grad.sum(-1, dtype=torch.float64) - grad.sum(-2, dtype=torch.float64)
        return from_end(sums[..., None])[..., 0], None


def _differences(x: Tensor) -> Tensor:
    return x[..., :, None] - x[..., None, :]


def delta_chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, size: int) -> Tensor:
    """q_i^T S_i, ``(N, L, Dv)``, for one direction, in chunks of ``size`` tokens; ``size >= L`` is one chunk, the parallel form.

    q, k: ``(N, L, Dk)``; v: ``(N, L, Dv)``; beta: ``(N, L)``, all of one dtype; log_decay: ``(N, L)``, float64, or None; tokens in
    reading order.
    """
    length = q.shape[1]
    size = size if size < length else length
    count = (length + size - 1) // size

    def split(x: Tensor) -> Tensor:  # zeros after the end write nothing and do not decay
        return pad(x, (0, 0, 0, count * size - length)).unflatten(1, (count, size))

    q, k, v, beta = split(q), split(k), split(v), split(beta[..., None])
    scores, overlaps, keys = q @ k.mT, (beta * k) @ k.mT, k
    if log_decay is None:
        scores = scores.tril()
    else:
        steps = split(log_decay.clamp_min(LOWEST)[..., None])
        # the other triangle is cut off before exp, which would overflow there
        mask = _Between.apply(steps[..., 0], q.dtype).tril(-1).exp().tril()
        scores, overlaps = scores * mask, overlaps * mask
    if count == 1:
        return (scores @ _solve(overlaps, beta * v))[:, 0]
    change = k.new_ones(1, 1, 1, 1)
    if log_decay is not None:
        into, onto, whole = (x.exp().to(k.dtype) for x in sums_inside(steps, False))
        q, keys, k, change = q * into, k * into, k * onto, whole
    writes, erased = _solve(overlaps, beta * torch.cat([v, keys], dim=-1)).split([v.shape[-1], k.shape[-1]], dim=-1)
    transition = change * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - k.mT @ erased
    states = entering(transition, k.mT @ writes)
    return (scores @ writes + (q - scores @ erased) @ states).flatten(1, 2)[:, :length]


def _solve(overlaps: Tensor, x: Tensor) -> Tensor:
    """(I + strictly lower triangle of ``overlaps``)^-1 x."""
    return torch.linalg.solve_triangular(overlaps, x, upper=False, unitriangular=True)


def entering(transition: Tensor, own: Tensor) -> Tensor:
    """The states that enter each chunk, ``(N, n, Dk, Dv)``: S_0 = 0, S_{c+1} = transition_c S_c + own_c.

    transition: ``(N, n, Dk, Dk)``; own: ``(N, n, Dk, Dv)``. More than ``GROUP`` chunks are joined in groups, whose sums are the same
    recurrence again: three times the products of a plain loop, in a depth that grows with the logarithm of n.
    """
    rows, count, width, _ = transition.shape
    if count <= GROUP:
        states = [torch.zeros_like(own[:, 0])]
        for c in range(count - 1):
            states.append(torch.baddbmm(own[:, c], transition[:, c], states[-1]) if c else own[:, 0])
        return torch.stack(states, dim=1)
    groups = (count + GROUP - 1) // GROUP
    missing = (0, 0, 0, 0, 0, groups * GROUP - count)
    transition, own = (pad(x, missing).unflatten(1, (groups, GROUP)).flatten(0, 1) for x in (transition, own))
    # what a group's chunks make of the state that enters it: a matrix and a summand, side by side
    start = torch.eye(width, dtype=own.dtype, device=own.device).expand(rows * groups, width, width)
    states = [torch.cat([start, torch.zeros_like(own[:, 0])], dim=-1)]
    own = pad(own, (width, 0))
    for c in range(GROUP):
        states.append(torch.baddbmm(own[:, c], transition[:, c], states[-1]))
    states = torch.stack(states, dim=1).unflatten(0, (rows, groups))
    through, added = states[..., :width], states[..., width:]
    starts = entering(through[:, :, -1], added[:, :, -1])
    return (through[:, :, :-1] @ starts[:, :, None] + added[:, :, :-1]).flatten(1, 2)[:, :count]
