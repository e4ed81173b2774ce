"""Log decays: from gates to the decay of each step, and the sums of them that every form needs.

Inside this package a *step decay* is a tensor ``(B or 1, L or 1, H, X)``: ``X`` is 1 for a decay per head and ``Dk`` for one per key
channel; a size of 1 in place of ``B`` and ``L`` stands for a decay that is the same in every step.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lba_exp.ops.checks import check_log_decay, choice
from lba_exp.ops.ranks import check_group, gather

CONVENTIONS = ("key", "query", "symmetric")
LOWEST = -1e4  # exp of it is 0 in every dtype; keeps sums finite for -inf and adds no rounding to float64 sums
GROUP = 256  # numbers that a GPU sums one after the other
GRID = 2.0**20  # sums of multiples of 1 / GRID are exact in float64 up to 2**33


def step_log_decays(
    log_gate: Tensor | None,
    convention: str = "key",
    *,
    before: Tensor | None = None,
    after: Tensor | None = None,
    sequence_group: "torch.distributed.ProcessGroup | None" = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The forward and backward decay of each step, from one gate per token (arXiv 2502.16249, the mask of its bidirectional form).

    With ``lambda_i = exp(log_gate_i)``: ``key`` (the paper's mask: both directions use the gate of the key's side) gives
    ``f_i = lambda_{i-1}``, ``b_i = lambda_{i+1}``; ``query`` (the causal convention, each direction its own gate) ``f_i = b_i = lambda_i``;
    ``symmetric`` (the later token's gate enters) ``f_i = lambda_i``, ``b_i = lambda_{i+1}``.

    log_gate: ``None``, fixed ``(H,)`` or ``(H, Dk)``, which come back unchanged (all conventions agree on them), or a sequence
        ``(B, L, H)`` or ``(B, L, H, Dk)``, float32 or float64, values <= 0.
    before, after: for one block of a longer sequence, the gate of the token before and after it, ``(B, H)`` or ``(B, H, Dk)``. A decay
        at an edge where none is given never enters a result and is 0.
    sequence_group: in their place, the ranks that hold consecutive blocks of the sequence, in the order of the ranks: each gets its
        neighbours' gates. Every rank calls, and takes part in the backward pass of either result.

    Returns ``(forward_log_decay, backward_log_decay)``, each of the shape of ``log_gate``. Raises ValueError for another shape, dtype or
    convention, and for positive values (checked in eager mode on CPU).
    """
    choice("convention", convention, CONVENTIONS)
    if log_gate is None:
        if before is not None or after is not None:
            raise ValueError("before and after: expected None where log_gate is None")
        return None, None
    check_log_decay("log_gate", log_gate)
    if log_gate.ndim < 3:
        if before is not None or after is not None:
            raise ValueError("before and after: expected None for a fixed log_gate, which is the same in every step")
        return log_gate, log_gate
    if sequence_group is not None:
        if before is not None or after is not None:
            raise ValueError("before and after: expected None beside sequence_group, which tells them")
        return _across_ranks(log_gate, convention, sequence_group)
    edge = torch.zeros_like(log_gate[:, :1])
    shape = tuple(edge[:, 0].shape)
    for name, gate in (("before", before), ("after", after)):
        if gate is not None and tuple(gate.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, one token of log_gate, got {tuple(gate.shape)}")
    first = edge if before is None else before[:, None].to(log_gate.dtype)
    last = edge if after is None else after[:, None].to(log_gate.dtype)
    previous = torch.cat([first, log_gate[:, :-1]], dim=1)
    following = torch.cat([log_gate[:, 1:], last], dim=1)
    own_forward = log_gate if before is not None else torch.cat([edge, log_gate[:, 1:]], dim=1)
    own_backward = log_gate if after is not None else torch.cat([log_gate[:, :-1], edge], dim=1)
    if convention == "key":
        return previous, following
    if convention == "query":
        return own_forward, own_backward
    return own_forward, following


def _across_ranks(log_gate: Tensor, convention: str, group: "torch.distributed.ProcessGroup") -> tuple[Tensor, Tensor]:
    check_group(group)
    edges = gather(torch.stack([log_gate[:, 0], log_gate[:, -1]]), group)
    rank, last = group.rank(), group.size() - 1
    before = None if rank == 0 else edges[rank - 1, 1]
    after = None if rank == last else edges[rank + 1, 0]
    forward, backward = step_log_decays(log_gate, convention, before=before, after=after)
    none = edges[:0].sum()  # a rank may use no neighbour's gate: its backward pass comes by all the same
    return forward + none, backward + none


def to_steps(log_decay: Tensor | None) -> Tensor | None:
    """A decay of any accepted shape as a step decay ``(B or 1, L or 1, H, X)``; None stays None."""
    if log_decay is None or log_decay.ndim == 4:
        return log_decay
    if log_decay.ndim == 3:
        return log_decay[..., None]
    if log_decay.ndim == 2:
        return log_decay[None, None]
    return log_decay[None, None, :, None]


def doubling_sums(x: Tensor, dim: int) -> Tensor:
    """``x.cumsum(dim)``, dim -1 or -2, as log2(n) additions of shifted copies."""
    count, step = x.shape[dim], 1
    while step < count:
        x = x + pad(x.narrow(dim, 0, count - step), (step, 0) if dim == -1 else (0, 0, step, 0))
        step *= 2
    return x


def cumulative(x: Tensor, dim: int) -> Tensor:
    """``x.cumsum(dim)``, dim -1 or -2, also under ``torch.use_deterministic_algorithms``, which allows no cumsum on a GPU."""
    if x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return doubling_sums(x, dim)
    if x.device.type == "cuda" and x.shape[dim] > 4 * GROUP:
        return grouped_sums(x, dim)
    return x.cumsum(dim)


def grouped_sums(x: Tensor, dim: int) -> Tensor:
    """``x.cumsum(dim)``, dim -1 or -2, within groups and over the groups: a GPU goes along a dimension with few threads, token by token."""
    if dim == -2:
        return grouped_sums(x.mT, -1).mT
    length = x.shape[-1]
    inside = pad(x, (0, -length % GROUP)).unflatten(-1, (-1, GROUP)).cumsum(-1)
    before = pad(cumulative(inside[..., :-1, -1], -1), (1, 0))
    return (inside + before[..., None]).flatten(-2)[..., :length]


def running_sum(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cumulative sums over the last dimension as two parts (high, low) of ``dtype``.

    ``(high_i - high_j) + (low_i - low_j)`` equals the sum over ``j < t <= i`` up to a few roundings of the sum itself, however large the
    sums before it are. The low part carries no gradient of its own: the high part's is the whole.
    """
    x = x.double().clamp_min(LOWEST)
    if dtype == torch.float64:
        coarse = torch.round(x.detach() * GRID) / GRID
        # the fine sums are tiny, the coarse ones exact
        return cumulative(x - coarse, -1), cumulative(coarse, -1)
    total = cumulative(x, -1)
    high = total.to(dtype)
    return high, (total.detach() - high.detach().double()).to(dtype)


def _outer_difference(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    (high_row, low_row), (high_column, low_column) = rows, columns
    high = high_row[..., :, None] - high_column[..., None, :]
    return high + (low_row[..., :, None] - low_column[..., None, :])


def between(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """``(..., size)``, or ``(..., 1)`` for equal steps, to ``(..., size, size)``: entry (i, j) sums ``j < t <= i``, of use where i >= j."""
    if x.shape[-1] == 1:
        place = torch.arange(size, dtype=dtype, device=x.device)
        return x.to(dtype).clamp_min(LOWEST)[..., None] * (place[:, None] - place)
    sums = running_sum(x, dtype)
    return _outer_difference(sums, sums)


def decay_mask(
    forward: Tensor | None, backward: Tensor | None, size: int, weight: float, directions: tuple[str, ...], like: Tensor
) -> Tensor:
    """The decay matrix M of ``size`` consecutive tokens, ``(..., size, size)`` in the dtype and on the device of ``like``.

    forward, backward: log decays ``(..., size or 1)``, one per step. Below the diagonal M is prod f_{j+1..i}, above it prod b_{i..j-1},
    on it ``weight``; a direction left out of ``directions`` is 0.
    """
    exponent = None
    if "forward" in directions and forward is not None:
        exponent = between(forward, size, like.dtype).tril(-1)
    if "backward" in directions and backward is not None:
        # sum over i <= t < j: the same sums of the sequence shifted by one step
        shifted = backward if backward.shape[-1] == 1 else pad(backward[..., :-1], (1, 0))
        upper = between(shifted, size, like.dtype).mT.triu(1)
        exponent = upper if exponent is None else exponent + upper
    # the other triangle is cut off before exp, where its differences are positive; so is the diagonal, which no decay reaches
    mask = like.new_ones(size, size) if exponent is None else exponent.exp()
    if directions == ("forward",):
        mask = mask.tril()
    if directions == ("backward",):
        mask = mask.triu()
    if weight != 1.0:
        diagonal = torch.eye(size, dtype=torch.bool, device=like.device)
        mask = torch.where(diagonal, weight, mask)
    return mask


def from_end(x: Tensor) -> Tensor:
    """``(..., n, X)``: each token's sum over itself and all after it."""
    return cumulative(x.flip(-2), -2).flip(-2)


def sums_inside(x: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For steps ``(..., n, X)`` of one direction: log decay from the state before to each token, from each to the state after, in all.

    In the order in which the direction reads: the first includes the token's own step, the second does not. Terms of one sign, never
    subtracted from one another: nothing cancels.
    """
    if reverse:
        x = x.flip(-2)
    into = cumulative(x, -2)
    onto = pad(from_end(x[..., 1:, :]), (0, 0, 0, 1))
    whole = into[..., -1:, :]
    return (into.flip(-2), onto.flip(-2), whole) if reverse else (into, onto, whole)


def adjoint_sums(row: Tensor | None, column: Tensor | None, reverse: bool) -> Tensor:
    """The adjoint of ``sums_inside`` (``(..., n, X)`` each): a step gets the rows read at or after it and the columns read before it."""
    total = None
    if row is not None:
        total = cumulative(row, -2) if reverse else from_end(row)
    if column is not None:
        before = pad(from_end(column[..., 1:, :]), (0, 0, 0, 1)) if reverse else pad(cumulative(column[..., :-1, :], -2), (0, 0, 1, 0))
        total = before if total is None else total + before
    return total


def empty_gradient(x: Tensor | None, length: int) -> Tensor | None:
    """Zeros like a step decay, in float64 where the gradients of many steps will be summed."""
    return None if x is None else torch.zeros_like(x, dtype=x.dtype if x.shape[1] == length else torch.float64)


def add_steps(target: Tensor, gradient: Tensor, start: int, stop: int) -> None:
    """Add the gradients ``(B, stop - start, H, X)`` of steps start..stop-1, summed over the sizes that ``target`` does not have."""
    if target.shape[1] > 1:
        target[:, start:stop] += gradient.sum_to_size(target.shape[0], *gradient.shape[1:])
    else:
        target += gradient.to(target.dtype).sum_to_size(target.shape)
