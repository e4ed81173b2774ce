"""The chunkwise form: states carried between chunks in both directions, the parallel form inside each: linear work in PyTorch.

For each chunk, U = sum of k v^T of its tokens decayed to its border; the states that enter the chunks are a linear recurrence over the U
(``scan.py``); a chunk's output is its own masked scores times v plus q, decayed from the border, times the entering states.
Training recomputes all of it. A gradient of a step's decay is a sum over the pairs of tokens that the step lies between; it is put together
from terms of one chunk: pairs inside, pairs with one end inside, and pairs around it (the product of the state and its adjoint).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lba_exp.ops.decays import LOWEST, decay_mask, sums_inside
from lba_exp.ops.scan import scan_states

SLICE_ELEMENTS = 2**18  # elements of the score matrices made at once in eager mode: what stays in the processor's cache


def split(x: Tensor, start: int, stop: int, chunk: int, dtype: torch.dtype) -> Tensor:
    """Tokens start..stop-1 of ``(B, L, H, D)`` as contiguous chunks ``(B, H, n, C, D)``, zeros after the end."""
    x = x[:, start:stop].to(dtype)
    missing = -(stop - start) % chunk
    if missing:
        x = pad(x, (0, 0, 0, 0, 0, missing))
    batch, _, heads, width = x.shape
    return x.view(batch, -1, chunk, heads, width).permute(0, 3, 1, 2, 4).contiguous()


def join(x: Tensor, length: int) -> Tensor:
    """Chunks ``(B, H, n, C, D)`` as ``(B, length, H, D)``, the zeros after the end dropped."""
    batch, heads, chunks, size, width = x.shape
    return x.permute(0, 2, 3, 1, 4).reshape(batch, chunks * size, heads, width)[:, :length]


def split_steps(x: Tensor | None, start: int, stop: int, chunk: int, dtype: torch.dtype) -> Tensor | None:
    """A step decay in chunks ``(B or 1, H, n or 1, C, X)``."""
    if x is None:
        return None
    x = x.clamp_min(LOWEST)
    if x.shape[1] == 1:
        return split(x.expand(-1, chunk, -1, -1), 0, chunk, chunk, dtype)
    return split(x, start, stop, chunk, dtype)


def scaled(x: Tensor, exponent: Tensor | None) -> Tensor:
    return x if exponent is None else x * exponent.exp()


class _Layout:
    """Where the chunks of a sequence lie, and the eager mode's slices of them."""

    def __init__(self, q: Tensor, chunk: int):
        batch, self.length, heads, _ = q.shape
        self.chunk = min(chunk, self.length)
        self.count = -(-self.length // self.chunk)
        step = self.count
        if not torch.compiler.is_compiling():
            step = max(1, SLICE_ELEMENTS // (batch * heads * self.chunk**2))
        self.slices = [(first, min(first + step, self.count)) for first in range(0, self.count, step)]

    def tokens(self, first: int, last: int) -> tuple[int, int]:
        return first * self.chunk, min(last * self.chunk, self.length)


class _Inputs:
    """The inputs of one slice in chunks; v (and the output's gradient) with the denominator as one more column."""

    def __init__(self, layout, first, last, q, k, v, steps, with_den, grads=None):
        start, stop = layout.tokens(first, last)
        self.start, self.stop, chunk = start, stop, layout.chunk
        self.q, self.k, self.v = (split(x, start, stop, chunk, q.dtype) for x in (q, k, v))
        self.steps = [split_steps(x, start, stop, chunk, q.dtype) for x in steps]
        if with_den:
            self.v = torch.cat([self.v, self.v.new_ones(*self.v.shape[:-1], 1)], dim=-1)
        if grads is not None:
            num, den = grads
            num = num if den is None else torch.cat([num, den[..., None]], dim=-1)
            self.grad = split(num, start, stop, chunk, q.dtype)

    def sums(self, direction):
        x = self.steps[direction == "backward"]
        return (None, None, None) if x is None else sums_inside(x, direction == "backward")

    def mask(self, weight, directions):
        if directions == ("forward", "backward") and weight == 1.0 and self.steps == [None, None]:
            return None
        rows = [None if x is None else x[..., 0] for x in self.steps]
        return decay_mask(*rows, self.q.shape[-2], weight, directions, self.q)


def _entering(layout, directions, q, k, v, steps, with_den, grads=None):
    """States (or, given the output's gradients, adjoint states) that enter each chunk, per direction."""
    if layout.count == 1:
        return {}
    adjoint = grads is not None
    buffers, totals = {}, {}
    for first, last in layout.slices:
        x = _Inputs(layout, first, last, q, k, v, steps, with_den, grads)
        for direction in directions:
            into, onto, total = x.sums(direction)
            own = scaled(x.q, into).mT @ x.grad if adjoint else scaled(x.k, onto).mT @ x.v
            if first == 0:
                buffers[direction] = own.new_empty(*own.shape[:2], layout.count, *own.shape[3:])
                totals[direction] = []
            buffers[direction][:, :, first:last] = own
            totals[direction].append(total)
    states = {}
    for direction in directions:
        total = totals[direction][0] if steps[direction == "backward"] is None or steps[direction == "backward"].shape[1] == 1 else None
        total = torch.cat(totals[direction], dim=2) if total is None and totals[direction][0] is not None else total
        states[direction] = scan_states(buffers.pop(direction), total, reverse=(direction == "backward") != adjoint)
    return states


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, forward, backward, weight, directions, with_den, chunk_size):
        ctx.save_for_backward(q, k, v, forward, backward)
        ctx.options = (weight, directions, with_den, chunk_size)
        layout, steps = _Layout(q, chunk_size), [forward, backward]
        states = _entering(layout, directions, q, k, v, steps, with_den)
        num = torch.empty_like(v)
        den = v.new_empty(v.shape[:3]) if with_den else None
        for first, last in layout.slices:
            x = _Inputs(layout, first, last, q, k, v, steps, with_den)
            scores = x.q @ x.k.mT
            mask = x.mask(weight, directions)
            out = (scores if mask is None else scores.mul_(mask)) @ x.v
            for direction in states:
                out += scaled(x.q, x.sums(direction)[0]) @ states[direction][:, :, first:last]
            out = join(out, x.stop - x.start)
            num[:, x.start : x.stop] = out[..., : v.shape[-1]]
            if with_den:
                den[:, x.start : x.stop] = out[..., -1]
        return num, den

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_num, grad_den):
        q, k, v, forward, backward = ctx.saved_tensors
        weight, directions, with_den, chunk_size = ctx.options
        layout, steps = _Layout(q, chunk_size), [forward, backward]
        grads = (grad_num, grad_den if with_den else None)
        states = _entering(layout, directions, q, k, v, steps, with_den)
        adjoints = _entering(layout, directions, q, k, v, steps, with_den, grads)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dsteps = [_empty_gradient(x, need) for x, need in zip(steps, ctx.needs_input_grad[3:5], strict=True)]
        for first, last in layout.slices:
            x = _Inputs(layout, first, last, q, k, v, steps, with_den, grads)
            mask = x.mask(weight, directions)
            scores, dscores = x.q @ x.k.mT, x.grad @ x.v.mT
            if mask is not None:
                scores, dscores = scores * mask, dscores.mul_(mask)
            dv_slice = scores.mT @ x.grad
            dq_slice, dk_slice = dscores @ x.k, dscores.mT @ x.q
            pairs = (x.q @ x.k.mT).mul_(dscores) if any(y is not None for y in dsteps) else None
            for direction in directions:
                dstep = dsteps[direction == "backward"]
                into, onto, total = x.sums(direction)
                row = column = through = 0.0
                if states:
                    state, adjoint = (y[direction][:, :, first:last] for y in (states, adjoints))
                    dq_state = scaled(x.grad @ state.mT, into)
                    dk_state = scaled(x.v @ adjoint.mT, onto)
                    dv_slice += scaled(x.k, onto) @ adjoint
                    dq_slice += dq_state
                    dk_slice += dk_state
                    if dstep is not None:
                        row, column = (x.q * dq_state).sum(-1, keepdim=True), (x.k * dk_state).sum(-1, keepdim=True)
                        through = (state * adjoint).sum(-1).sum(-1)[..., None, None] * total.exp()
                if dstep is not None:
                    reverse = direction == "backward"
                    triangle = pairs.triu(1) if reverse else pairs.tril(-1)
                    row = row + triangle.sum(-1)[..., None] - triangle.sum(-2)[..., None]
                    _add_steps(dstep, _step_gradient(row, column, reverse) + through, x.start, x.stop, layout)
            dq[:, x.start : x.stop] = join(dq_slice, x.stop - x.start)
            dk[:, x.start : x.stop] = join(dk_slice, x.stop - x.start)
            dv[:, x.start : x.stop] = join(dv_slice[..., : v.shape[-1]], x.stop - x.start)
        dsteps = [None if x is None else x.to(y.dtype) for x, y in zip(dsteps, steps, strict=True)]
        return dq, dk, dv, *dsteps, None, None, None, None


def _empty_gradient(x: Tensor | None, needed: bool) -> Tensor | None:
    return torch.zeros_like(x, dtype=torch.float64) if x is not None and needed else None


def _step_gradient(row: Tensor, column: Tensor | float, reverse: bool) -> Tensor:
    """The adjoint of ``sums_inside``: each step collects the rows that it lies before and the columns that it lies after."""
    if not isinstance(column, Tensor):
        column = torch.zeros_like(row)
    if reverse:
        row, column = row.flip(-2), column.flip(-2)
    rows = row.flip(-2).cumsum(-2).flip(-2)
    columns = pad(column[..., :-1, :].cumsum(-2), (0, 0, 1, 0))
    total = rows + columns
    return total.flip(-2) if reverse else total


def _add_steps(target: Tensor, gradient: Tensor, start: int, stop: int, layout: _Layout) -> None:
    gradient = join(gradient, stop - start)
    if target.shape[1] == layout.length:
        target[:, start:stop] += gradient.sum_to_size(target.shape[0], *gradient.shape[1:])
    else:
        target += gradient.double().sum_to_size(target.shape)


def chunkwise(
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
    """Numerator ``(B, L, H, Dv)`` and denominator ``(B, L, H)`` in O(L C d + L d^2) work and O(L d + L d^2 / C) memory, also in training.

    Arguments as in ``parallel``.
    """
    if any(x is not None and x.shape[-1] > 1 for x in (forward, backward)):
        raise ValueError("form: 'chunkwise' does not take a vector decay yet; use 'recurrent'")
    return _Chunkwise.apply(q, k, v, forward, backward, weight, directions, with_den, chunk_size)
