"""flash-linear-attention's chunkwise kernel, ``fla.ops.simple_gla.chunk_simple_gla``, as a contender beside the operator's forms.

``fla``
    One causal pass, the numerators of direction "forward": y_i = sum_{j <= i} f_{j+1} ... f_i (q_i . k_j) v_j. Never divided, whatever
    the operator does beside it: half of the operator's work, what the kernel itself costs.
``fla-x2``
    What a user of it would write for both directions: a causal pass over q, k, v and the forward decays, one over the flipped ones and the
    backward decays, flipped back, the two added and the diagonal (q_i . k_i) v_i taken out once: the operator's numerators. Where the
    operator divides, so does it: without decay by ``sum`` of DENOMINATORS, which takes no pass of the kernel, else by the quicker of the
    other two, tried on the forward pass of each case before it is measured.

Both take and give ``(B, L, H, D)`` and work in the dtype of q, as the kernel's outputs are. A fixed decay goes in as ``g_gamma``, which
has no gradient there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from lba_exp.bench.measure import timed

ONCE, TWICE = NAMES = ("fla", "fla-x2")
# column: v with further columns of ones, which become the denominator; pass: two more passes, over ones in place of v;
# sum: q_i . sum_j k_j, which is right without decay only
DENOMINATORS = ("column", "pass", "sum")
COLUMNS = 16  # of ones: rows stay aligned, and the kernel's tiles are no narrower
TRIALS = 5


def missing(device: torch.device) -> str | None:
    """Why it cannot be measured here, as the end of a sentence; None where it can."""
    if device.type != "cuda":
        return "runs on CUDA alone: give --device cuda"
    if find_spec("fla") is None:
        return "is not installed: pip install 'lba-exp[fla]'"
    return None


def kernel() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The kernel, imported when it is first needed."""
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla


def check(name: str, q: Tensor, forward: Tensor | None, backward: Tensor | None, direction: str) -> None:
    """Raises ValueError, as the operator does of a form, where the contender has no such case."""
    if any(x is not None and x.ndim in (2, 4) for x in (forward, backward)):
        raise ValueError(f"form: {name!r} has one decay a head, not one a channel")
    if q.dtype == torch.float64:
        raise ValueError(f"form: {name!r} has no float64")
    if name == TWICE and direction != "both":
        raise ValueError(f"form: {name!r} is of both directions, not of {direction!r} alone")


def causal(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """The numerators of direction "forward"; ``log_decay`` None, ``(H,)`` or ``(B, L, H)``."""
    decay = {} if log_decay is None else {"g_gamma" if log_decay.ndim == 1 else "g": log_decay}
    return kernel()(q, k, v, scale=1.0, **decay)[0]


def both_directions(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None, denominator: str | None, eps: float
) -> Tensor:
    """``fla-x2``; ``denominator``: of DENOMINATORS, None for numerators alone."""
    width = v.shape[-1]
    reverse_q, reverse_k = q.flip(1), k.flip(1)
    reverse = backward if backward is None or backward.ndim == 1 else backward.flip(1)

    def numerators(x: Tensor) -> Tensor:
        sides = causal(q, k, x, forward) + causal(reverse_q, reverse_k, x.flip(1), reverse).flip(1)
        return sides - (q * k).sum(-1, keepdim=True) * x

    if denominator is None:
        return numerators(v)
    if denominator == "column":
        found = numerators(F.pad(v, (0, COLUMNS), value=1.0))
        return found[..., :width] / (found[..., width : width + 1] + eps)
    if denominator == "sum":
        den = (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)
    else:
        den = numerators(v.new_ones(*v.shape[:-1], COLUMNS))[..., :1]
    return numerators(v) / (den + eps)


def quickest_denominator(make: Callable[[str], Callable[[], Tensor]], decays: bool, device: torch.device) -> str:
    """The quickest of DENOMINATORS.

    Args:
        make: one of them -> a call with it.
        decays: whether there are any.
    """
    if not decays:
        return "sum"
    times = {}
    for way in ("column", "pass"):
        call = make(way)
        call()  # builds and tunes kernels
        times[way] = statistics.median(timed(call, TRIALS, device))
    return min(times, key=times.__getitem__)
