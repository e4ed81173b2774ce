"""Sequence parallelism: a sequence cut into consecutive blocks, one a rank of a process group, each rank with its own tokens alone.

What a rank knows of the others is one state per direction: the sum of k v^T over a block, decayed to the block's border, and the block's
whole decay. One all-gather of these brings them together, whatever the length: B H (Dk (Dv + 1) + X) numbers a direction and rank, X being
1 or Dk. The states that enter a block then read like those of a chunk. The backward pass sends as much in one all-reduce. All is linear in
the rank's own tokens, and exact: the sums are those of one device in another order.

A block may be a million tokens long: it is gone through in slices, and what autograd keeps are q, k, v and the decays as they came in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import pad

from lba_exp.ops.channels import decayed
from lba_exp.ops.decays import LOWEST, add_steps, adjoint_sums, empty_gradient, sums_inside
from lba_exp.ops.precision import compute_dtype, first_derivative
from lba_exp.ops.ranks import gather

SLICE_ELEMENTS = 2**19  # elements of k or v worked on at once: what stays in a processor's cache
GPU_SLICE_ELEMENTS = 2**24  # the same on a GPU


def add_other_ranks(
    num: Tensor,
    den: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward: Tensor | None,
    backward: Tensor | None,
    *,
    directions: tuple[str, ...],
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor | None]:
    """The numerator ``(B, L, H, Dv)`` and the denominator ``(B, L, H)`` (or None) of this rank's tokens, with what other ranks add to them.

    q, k, v: this rank's tokens, zero where padded; forward, backward: step decays ``(B or 1, L or 1, H, X)``. B, H, Dk, Dv, the dtype and
    the kinds of decay are the same on every rank, L need not be.
    """
    sent = []
    for direction in directions:
        steps = backward if direction == "backward" else forward
        own, whole = _Leave.apply(k, v, steps, direction == "backward", den is not None, compute_dtype(q, k, v))
        # a block without decay keeps states as they are
        sent += [own, own.new_zeros(*own.shape[:2], 1, 1) if whole is None else whole]
    gathered = gather(torch.cat([x.flatten() for x in sent]), group)
    gathered = [x.view(-1, *y.shape) for x, y in zip(gathered.split([x.numel() for x in sent], dim=1), sent, strict=True)]
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    for number, direction in enumerate(directions):
        reverse = direction == "backward"
        own, whole = gathered[2 * number : 2 * number + 2]
        state = own[:0].sum(0)  # zeros that hang on what was gathered: every rank takes part in the backward pass
        for other in range(ranks - 1, rank, -1) if reverse else range(rank):
            state = state * whole[other].exp().mT + own[other]
        num, den = _Enter.apply(num.to(state.dtype), den, q, state, backward if reverse else forward, reverse, number > 0)
    return num, den


class _Block:
    """A block's slices, in the order in which a direction reads them, and the decays between their tokens and the block's borders.

    Args:
        x: ``(B, L, H, D)``, one of the block's tensors.
        width: the larger of Dk and Dv.
        steps: step decays of the direction, or None.
    """

    def __init__(self, x: Tensor, width: int, steps: Tensor | None, reverse: bool, dtype: torch.dtype):
        self.batch, self.length, self.heads = x.shape[:3]
        self.steps, self.reverse, self.dtype = steps, reverse, dtype
        elements = SLICE_ELEMENTS if x.device.type == "cpu" else GPU_SLICE_ELEMENTS
        size = max(1, elements // (self.batch * self.heads * width))
        self.cuts = [(start, min(start + size, self.length)) for start in range(0, self.length, size)]

    def tokens(self, x: Tensor, start: int, stop: int) -> Tensor:
        """``(B, H, n, D)`` of ``(B, L, H, D)``, in the dtype of the work."""
        return x[:, start:stop].to(self.dtype).transpose(1, 2)

    def slices(self, into: bool) -> Iterator[tuple[int, int, Tensor | None]]:
        """``start, stop`` of each slice and ``(B or 1, H, n, X)``, the log decay from the block's first border to each token (``into``; the
        slices come as they are read), or from each token to the block's last border (they come the other way round). The sums are in
        float64: a block may be long."""
        carry = 0.0
        for start, stop in reversed(self.cuts) if self.reverse == into else self.cuts:
            if self.steps is None:
                yield start, stop, None
                continue
            to, onto, whole = sums_inside(self._steps(start, stop), self.reverse)
            yield start, stop, (carry + (to if into else onto)).to(self.dtype)
            carry = carry + whole
        self.whole = None if self.steps is None else carry.to(self.dtype).expand(self.batch, -1, -1, -1)

    def _steps(self, start: int, stop: int) -> Tensor:
        steps = self.steps if self.steps.shape[1] < self.length else self.steps[:, start:stop]
        return steps.clamp_min(LOWEST).double().expand(-1, stop - start, -1, -1).transpose(1, 2)


class _Leave(torch.autograd.Function):
    """k, v -> the state that a block adds, ``(B, H, Dk, Dv)``, decayed to its last border, and its whole log decay ``(B, H, 1, X)``.

    With the denominator v has one more column, of ones.
    """

    @staticmethod
    def forward(ctx, k, v, steps, reverse, with_den, dtype):
        ctx.save_for_backward(k, v, steps)
        ctx.options = (reverse, with_den, dtype)
        block = _Block(k, max(k.shape[-1], v.shape[-1]), steps, reverse, dtype)
        own = k.new_zeros(block.batch, block.heads, k.shape[-1], v.shape[-1] + with_den, dtype=dtype)
        for start, stop, onto in block.slices(into=False):
            own += decayed(block.tokens(k, start, stop), onto).mT @ _with_ones(block.tokens(v, start, stop), with_den)
        return own, block.whole

    @staticmethod
    @first_derivative
    def backward(ctx, grad, grad_whole):
        k, v, steps = ctx.saved_tensors
        reverse, with_den, dtype = ctx.options
        block = _Block(k, max(k.shape[-1], v.shape[-1]), steps, reverse, dtype)
        dk, dv, dsteps = torch.empty_like(k), torch.empty_like(v), _empty(ctx, 2, steps, block)
        found = []
        for start, stop, onto in block.slices(into=False):
            own_k = block.tokens(k, start, stop)
            dk_part = decayed(_with_ones(block.tokens(v, start, stop), with_den) @ grad.mT, onto)
            dk[:, start:stop] = dk_part.transpose(1, 2)
            dv[:, start:stop] = (decayed(own_k, onto) @ grad[..., : v.shape[-1]]).transpose(1, 2)
            if dsteps is not None:
                found.append((start, stop, _fit(own_k * dk_part, steps)))
        carry = 0.0 if grad_whole is None or dsteps is None else grad_whole.double()
        for start, stop, column in reversed(found):  # in the order in which the direction reads
            _add(dsteps, carry + adjoint_sums(None, column.double(), reverse), start, stop)
            carry = carry + column.sum(-2, keepdim=True, dtype=torch.float64)
        return dk, dv, _as(dsteps, steps), None, None, None


class _Enter(torch.autograd.Function):
    """Numerator and denominator with what the state ``(B, H, Dk, Dv)`` adds that enters a block at its first border."""

    @staticmethod
    def forward(ctx, num, den, q, state, steps, reverse, in_place):
        ctx.save_for_backward(q, state, steps)
        ctx.reverse = reverse
        block = _Block(q, max(q.shape[-1], state.shape[-1]), steps, reverse, state.dtype)
        if in_place:
            ctx.mark_dirty(*(x for x in (num, den) if x is not None))
        else:
            num, den = num.clone(memory_format=torch.contiguous_format), None if den is None else den.clone()
        for start, stop, into in block.slices(into=True):
            out = (decayed(block.tokens(q, start, stop), into) @ state).transpose(1, 2)
            num[:, start:stop] += out[..., : num.shape[-1]]
            if den is not None:
                den[:, start:stop] += out[..., -1]
        return num, den

    @staticmethod
    @first_derivative
    def backward(ctx, grad_num, grad_den):
        q, state, steps = ctx.saved_tensors
        reverse = ctx.reverse
        block = _Block(q, max(q.shape[-1], state.shape[-1]), steps, reverse, state.dtype)
        dq, dstate, dsteps = torch.empty_like(q), torch.zeros_like(state), _empty(ctx, 4, steps, block)
        found = []
        for start, stop, into in block.slices(into=True):
            grad = block.tokens(grad_num, start, stop)
            if grad_den is not None:
                grad = torch.cat([grad, block.tokens(grad_den[..., None], start, stop)], dim=-1)
            own_q = block.tokens(q, start, stop)
            dq_part = decayed(grad @ state.mT, into)
            dq[:, start:stop] = dq_part.transpose(1, 2)
            dstate += decayed(own_q, into).mT @ grad
            if dsteps is not None:
                found.append((start, stop, _fit(own_q * dq_part, steps)))
        carry = 0.0
        for start, stop, row in reversed(found):  # against the order in which the direction reads
            _add(dsteps, carry + adjoint_sums(row.double(), None, reverse), start, stop)
            carry = carry + row.sum(-2, keepdim=True, dtype=torch.float64)
        return grad_num, grad_den, dq, dstate, _as(dsteps, steps), None, None


def _with_ones(v: Tensor, with_den: bool) -> Tensor:
    return pad(v, (0, 1), value=1.0) if with_den else v


def _fit(x: Tensor, steps: Tensor) -> Tensor:
    """``(B, H, n, X)``, summed over channels where the decay has one value for all of them."""
    return x.sum(-1, keepdim=True) if steps.shape[-1] == 1 else x


def _empty(ctx, place: int, steps: Tensor | None, block: _Block) -> Tensor | None:
    return empty_gradient(steps, block.length) if ctx.needs_input_grad[place] else None


def _add(dsteps: Tensor, gradient: Tensor, start: int, stop: int) -> None:
    add_steps(dsteps, gradient.transpose(1, 2), start, stop)


def _as(dsteps: Tensor | None, steps: Tensor | None) -> Tensor | None:
    return None if dsteps is None else dsteps.to(steps.dtype)
