"""The pairs of tokens inside a chunk: masked scores and their gradients, with one decay per head or one per channel."""

import torch
from torch import Tensor

from lba_exp.ops.channels import channel_gradients, channel_scores
from lba_exp.ops.decays import decay_mask


def is_vector(*steps: Tensor | None) -> bool:
    """Whether any of the step decays has one value per channel."""
    return any(x is not None and x.shape[-1] > 1 for x in steps)


def _mask(size: int, forward: Tensor | None, backward: Tensor | None, weight: float, directions: tuple[str, ...], like: Tensor):
    if forward is None and backward is None and weight == 1.0 and len(directions) == 2:
        return None
    rows = [None if x is None else x[..., 0] for x in (forward, backward)]
    return decay_mask(*rows, size, weight, directions, like)


def inside_scores(
    q: Tensor, k: Tensor, forward: Tensor | None, backward: Tensor | None, weight: float, directions: tuple[str, ...]
) -> Tensor:
    """Masked scores ``(..., C, C)`` of q, k ``(..., C, Dk)`` under log decays ``(..., C, X)``; C a power of two where X > 1."""
    if is_vector(forward, backward):
        return channel_scores(q, k, forward, backward, 1, weight, directions)
    mask = _mask(q.shape[-2], forward, backward, weight, directions, q)
    scores = q @ k.mT
    return scores if mask is None else scores * mask


def inside_gradients(
    grad: Tensor, q: Tensor, k: Tensor, forward: Tensor | None, backward: Tensor | None, weight: float, directions: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The masked scores, dq, dk and, per direction, the gradient of each step's log decay, ``(..., C, X)``.

    grad: the gradient of the masked scores, ``(..., C, C)``. A step's gradient sums over the pairs that it lies between; none of the sums
    takes back what another put in, so a small gradient beside large ones is as exact as they are.
    """
    if is_vector(forward, backward):
        scores = channel_scores(q, k, forward, backward, 1, weight, directions)
        parts = channel_gradients(grad, q, k, forward, backward, weight, directions)
        dq, dk = (sum(pair[side] for pair in parts.values()) for side in (0, 1))
        return scores, dq, dk, {name: parts[name][2] for name in directions}
    mask = _mask(q.shape[-2], forward, backward, weight, directions, q)
    scores = q @ k.mT
    if mask is not None:
        grad = grad * mask
    steps = {}
    if forward is not None or backward is not None:
        pairs, ones = scores * grad, torch.ones_like(grad[(0,) * (grad.ndim - 2)])
        if "forward" in directions:  # queries at t or after it, keys before it
            steps["forward"] = (ones.triu() @ pairs).tril(-1).sum(-1, keepdim=True)
        if "backward" in directions:  # queries at t or before it, keys after it
            steps["backward"] = (ones.tril() @ pairs).triu(1).sum(-1, keepdim=True)
    return scores if mask is None else scores * mask, grad @ k, grad.mT @ q, steps
