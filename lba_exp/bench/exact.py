"""The judge of every form: single rows of the output by direct summation in float64, from the definition alone.

No form of the operator has a part in it, and it is as exact at 65,536 tokens as at 10: row i costs O(L D), whatever the length.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 64  # rows (sequence, token) that are judged, each at every head

Row = tuple[int, int]


def sample_rows(batch: int, length: int, count: int = ROWS, seed: int = 0) -> list[Row]:
    """Up to ``count`` different (sequence, token) pairs: the first and the last token of all, the others at random."""
    total = batch * length
    if total <= count:
        flat = range(total)
    else:
        drawn = torch.randint(1, total - 1, (count - 2,), generator=torch.Generator().manual_seed(seed)).tolist()
        flat = sorted({0, *drawn, total - 1})
    return [divmod(n, length) for n in flat]


def linear_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_log_decay: Tensor | None,
    backward_log_decay: Tensor | None,
    rows: list[Row],
    *,
    scaled: bool = True,
    direction: str = "both",
    eps: float = 1e-6,
) -> Tensor:
    """Rows of ``lba_exp.ops.bidirectional_linear_attention`` (diagonal weight 1), ``(rows, H, Dv)``, float64; arguments as there.

    M_ij = exp of the sum of the forward log decays of j+1 ... i for j < i, of the backward ones of i ... j-1 for j > i (arXiv 2502.16249,
    its mask), each sum taken from row i outwards in float64.
    """
    length = q.shape[1]
    found = []
    for sequence, group in _by_sequence(rows):
        qs, ks, vs = (x[sequence].double() for x in (q, k, v))
        forward, backward = (_steps(x, sequence, qs) for x in (forward_log_decay, backward_log_decay))
        for i in group:
            lower = forward[1 : i + 1].flip(0).cumsum(0).flip(0).exp()
            upper = backward[i : length - 1].cumsum(0).exp()
            lower = lower * (direction != "backward")
            upper = upper * (direction != "forward")
            mask = torch.cat([lower, torch.ones_like(forward[:1]), upper])  # (L, H, 1 or Dk)
            if mask.shape[-1] == 1:
                scores = torch.einsum("hd,lhd->lh", qs[i], ks) * mask[..., 0]
            else:
                scores = (qs[i] * ks * mask).sum(-1)
            num, den = torch.einsum("lh,lhe->he", scores, vs), scores.sum(0)
            found.append(num / (den + eps)[:, None] if scaled else num)
    return torch.stack(found)


def softmax_rows(q: Tensor, k: Tensor, v: Tensor, rows: list[Row]) -> Tensor:
    """Rows of softmax(q k^T / sqrt(Dk)) v in float64, ``(rows, H, Dv)``; q, k, v ``(B, L, H, D)``."""
    found = []
    for sequence, group in _by_sequence(rows):
        qs, ks, vs = (x[sequence].double() for x in (q, k, v))
        for i in group:
            weights = (torch.einsum("hd,lhd->lh", qs[i], ks) / q.shape[-1] ** 0.5).softmax(0)
            found.append(torch.einsum("lh,lhe->he", weights, vs))
    return torch.stack(found)


def relative_error(y: Tensor, rows: list[Row], exact: Tensor) -> float:
    """Relative L2 error of an output ``(B, L, H, Dv)`` over the rows that ``exact`` holds; not a number where the output is not finite."""
    sequences, tokens = torch.tensor(rows, device=y.device).unbind(1)
    return float((y[sequences, tokens].double() - exact).norm() / exact.norm())


def _by_sequence(rows: list[Row]) -> list[tuple[int, list[int]]]:
    return [(b, [i for other, i in rows if other == b]) for b in dict.fromkeys(b for b, _ in rows)]


def _steps(log_decay: Tensor | None, sequence: int, like: Tensor) -> Tensor:
    """One sequence's log decays in float64, ``(L, H, 1 or Dk)``; zeros for no decay."""
    length, heads, _ = like.shape
    if log_decay is None:
        return like.new_zeros(length, heads, 1)
    x = log_decay.double()
    x = x[sequence] if x.ndim > 2 else x.expand(length, *x.shape)
    return x if x.ndim == 3 else x[..., None]
