"""The parallel form: the whole masked score matrix, matrix products only (arXiv 2502.16249, Y = Scale(Q K^T (.) M) V)."""

from torch import Tensor

from lba_exp.ops.decays import decay_mask


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

    Arguments as ``lba_exp.ops.api.run_form`` hands them over: inputs of one dtype (float32 or float64), step decays, None = no decay.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    if any(x is not None and x.shape[-1] > 1 for x in (forward, backward)):
        raise ValueError("form: 'parallel' does not take a vector decay yet; use 'recurrent'")
    scores = q @ k.mT
    if forward is not None or backward is not None or weight != 1.0 or len(directions) == 1:
        rows = [None if x is None else x[..., 0].transpose(1, 2) for x in (forward, backward)]  # (B, H, L)
        scores = scores * decay_mask(*rows, q.shape[2], weight, directions, q)
    numerator = (scores @ v).transpose(1, 2)
    return numerator, scores.sum(-1).transpose(1, 2) if with_den else None
