"""Scores q_i . k_j with a decay per channel between i and j, without a tensor of pairs of tokens times channels.

A block of tokens is halved again and again. For a query in one half and a key in the other the decay between them is the product of the
decay from the key to the border and from the border to the query. Both are at most 1, so nothing overflows, and both exponents are sums of
terms of one sign, built up from those of the halves, so nothing cancels. Every pair meets at exactly one border.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lba_exp.ops.decays import adjoint_sums, decay_mask, sums_inside

SMALLEST = 8  # tokens: blocks of at most this many are compared pair by pair


def halving(length: int) -> tuple[int, int]:
    """(tokens of the smallest blocks, at most ``SMALLEST``; padded length): how ``channel_scores`` cuts ``length`` tokens."""
    levels = 0
    while -(-length // 2**levels) > SMALLEST:
        levels += 1
    block = -(-length // 2**levels)
    return block, block * 2**levels


def decayed(x: Tensor, exponent: Tensor | None) -> Tensor:
    """x times exp(exponent); None = no decay."""
    return x if exponent is None else x * exponent.exp()


def _halves(x: Tensor | None, size: int) -> tuple[Tensor | None, Tensor | None]:
    """The first and the second half, ``(..., n, size, D)``, of each of the n blocks of ``2 size`` tokens of ``(..., C, D)``."""
    if x is None:
        return None, None
    x = x.unflatten(-2, (-1, 2, size))
    return x[..., 0, :, :], x[..., 1, :, :]


def border_sums(steps: Tensor, block: int, reverse: bool) -> list[tuple[int, Tensor, Tensor]]:
    """For each level (size of the halves, from ``block`` up): ``sums_inside`` of all halves, (into, onto), each ``(..., C, X)``."""
    count = steps.shape[-2]
    into, onto, whole = sums_inside(steps.unflatten(-2, (-1, block)), reverse)
    levels, size = [], block
    while size < count:
        levels.append((size, into.flatten(-3, -2), onto.flatten(-3, -2)))
        into, onto, whole = (x.unflatten(-3, (-1, 2)) for x in (into, onto, whole))
        whole_first, whole_second = whole.unbind(-3)
        # what is read later in this direction takes the whole of the half before it
        late, early = (whole_second, None) if reverse else (None, whole_first)
        into = torch.cat([_plus(into[..., 0, :, :], late), _plus(into[..., 1, :, :], early)], dim=-2)
        late, early = (None, whole_first) if reverse else (whole_second, None)
        onto = torch.cat([_plus(onto[..., 0, :, :], late), _plus(onto[..., 1, :, :], early)], dim=-2)
        whole = whole_first + whole_second
        size *= 2
    return levels


def _plus(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y


def _levels(steps: Tensor | None, block: int, count: int, reverse: bool) -> list[tuple[int, Tensor | None, Tensor | None]]:
    if steps is not None:
        return border_sums(steps, block, reverse)
    sizes = []
    while block < count:
        sizes.append((block, None, None))
        block *= 2
    return sizes


def channel_scores(
    q: Tensor, k: Tensor, forward: Tensor | None, backward: Tensor | None, block: int, weight: float, directions: tuple[str, ...]
) -> Tensor:
    """Masked scores ``(..., C, C)``: sum over channels of M_ij q_i k_j, M as in ``decay_mask``.

    q, k: ``(..., C, Dk)`` with C = ``block`` times a power of two; forward, backward: log decays ``(..., C, X)``, X = 1 or Dk, or None.
    """
    count = q.shape[-2]
    if block == 1:
        scores = weight * (q * k).sum(-1)[..., None, None]
    else:
        steps = [None if x is None else x.unflatten(-2, (-1, block)).mT for x in (forward, backward)]
        mask = decay_mask(*steps, block, weight, directions, q)  # (..., n, X, block, block)
        products = q.unflatten(-2, (-1, block)).mT[..., :, None] * k.unflatten(-2, (-1, block)).mT[..., None, :]
        scores = (products * mask).sum(-3)
    for (size, into_f, onto_f), (_, into_b, onto_b) in zip(
        _levels(forward, block, count, False), _levels(backward, block, count, True), strict=True
    ):
        (q_first, q_second), (k_first, k_second) = _halves(q, size), _halves(k, size)
        lower = upper = q.new_zeros(()).expand(*scores.shape[:-3], count // (2 * size), size, size)
        if "forward" in directions:
            lower = decayed(q_second, _halves(into_f, size)[1]) @ decayed(k_first, _halves(onto_f, size)[0]).mT
        if "backward" in directions:
            upper = decayed(q_first, _halves(into_b, size)[0]) @ decayed(k_second, _halves(onto_b, size)[1]).mT
        first, second = scores.unflatten(-3, (-1, 2)).unbind(-3)
        scores = torch.cat([torch.cat([first, upper], dim=-1), torch.cat([lower, second], dim=-1)], dim=-2)
    return scores[..., 0, :, :]


def channel_gradients(
    grad: Tensor, q: Tensor, k: Tensor, forward: Tensor | None, backward: Tensor | None, weight: float, directions: tuple[str, ...]
) -> dict[str, tuple[Tensor, ...]]:
    """The adjoint of ``channel_scores`` with ``block`` 1: (dq, dk) of the diagonal, (dq, dk, gradient of the steps) of each direction.

    The steps' gradients are ``(..., C, Dk)``, whether their decay has channels or not.
    """
    count = q.shape[-2]
    diagonal = weight * grad.diagonal(dim1=-2, dim2=-1)[..., None]
    parts = {"diagonal": (diagonal * k, diagonal * q)}
    for direction in directions:
        reverse = direction == "backward"
        near, far = (0, 1) if reverse else (1, 0)  # the half that the queries lie in, the half that the keys lie in
        dq, dk, dsteps, inner = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(q), grad[..., None, :, :]
        for size, into, onto in reversed(_levels(backward if reverse else forward, 1, count, reverse)):
            into, onto = _halves(into, size)[near], _halves(onto, size)[far]
            q_near, k_far = _halves(q, size)[near], _halves(k, size)[far]
            inner = inner.unflatten(-1, (2, size)).unflatten(-3, (2, size))
            between = inner[..., near, :, far, :]
            dq_near = decayed(between @ decayed(k_far, onto), into)
            dk_far = decayed(between.mT @ decayed(q_near, into), onto)
            dq.unflatten(-2, (-1, 2, size))[..., near, :, :] += dq_near
            dk.unflatten(-2, (-1, 2, size))[..., far, :, :] += dk_far
            if into is not None:
                target = dsteps.unflatten(-2, (-1, 2, size))
                target[..., near, :, :] += adjoint_sums(q_near * dq_near, None, reverse)
                target[..., far, :, :] += adjoint_sums(None, k_far * dk_far, reverse)
            inner = torch.stack([inner[..., 0, :, 0, :], inner[..., 1, :, 1, :]], dim=-3).flatten(-4, -3)
        parts[direction] = (dq, dk, dsteps)
    return parts


def pad_tokens(x: Tensor | None, count: int) -> Tensor | None:
    """``(..., n, D)`` with zeros after the end up to ``count`` tokens; None stays None."""
    if x is None or x.shape[-2] == count:
        return x
    return pad(x, (0, 0, 0, count - x.shape[-2]))
