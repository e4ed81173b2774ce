"""The parallel form: the whole masked score matrix, matrix products only (arXiv 2502.16249, Y = Scale(Q K^T (.) M) V)."""

from torch import Tensor

from lba_exp.ops.channels import channel_scores, halving, pad_tokens
from lba_exp.ops.decays import LOWEST, decay_mask
from lba_exp.ops.inside import is_vector
from lba_exp.ops.precision import compute_dtype


def _channel_scores(
    q: Tensor, k: Tensor, forward: Tensor | None, backward: Tensor | None, weight: float, directions: tuple[str, ...]
) -> Tensor:
    length = q.shape[2]
    block, padded = halving(length)
    steps = []
    for x in (forward, backward):
        if x is not None:
            x = x.clamp_min(LOWEST).expand(-1, length, -1, -1).transpose(1, 2)
        steps.append(pad_tokens(x, padded))
    scores = channel_scores(pad_tokens(q, padded), pad_tokens(k, padded), *steps, block, weight, directions)
    return scores[..., :length, :length]


def parallel(
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
    """Numerator ``(B, L, H, Dv)`` and denominator ``(B, L, H)`` in O(L^2) work and memory; ``chunk_size`` has no meaning here.

    Arguments as ``lba_exp.ops.api.run_form`` hands them over: checked, padded tokens 0, step decays as ``decays.py`` says, None = no decay.
    """
    dtype = compute_dtype(q, k, v)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    if is_vector(forward, backward):
        scores = _channel_scores(q, k, forward, backward, weight, directions)
        numerator = (scores @ v).transpose(1, 2)
        return numerator, scores.sum(-1).transpose(1, 2) if with_den else None
    scores = q @ k.mT
    if forward is not None or backward is not None or weight != 1.0 or len(directions) == 1:
        rows = [None if x is None else x[..., 0].transpose(1, 2) for x in (forward, backward)]  # (B, H, L)
        scores = scores * decay_mask(*rows, q.shape[2], weight, directions, q)
    numerator = (scores @ v).transpose(1, 2)
    return numerator, scores.sum(-1).transpose(1, 2) if with_den else None
