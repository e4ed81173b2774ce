"""The chunkwise form: states carried between chunks in both directions, masked scores inside each: linear work in PyTorch.

For each chunk, U = sum of k v^T over its tokens, decayed to its border; the states that enter the chunks are a linear recurrence over the U
(``scan.py``), run slice by slice in eager mode, so that only the states of one slice exist at a time; a chunk's output is its own masked
scores times v (``inside.py``) plus q, decayed from the border, times the entering states.
Training recomputes all of it. A gradient of a step's decay is a sum over the pairs of tokens that the step lies between; it is put together
from terms of one chunk: pairs inside, pairs with one end inside, and pairs around it (the product of the state and its adjoint).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lba_exp.ops.channels import decayed
from lba_exp.ops.decays import LOWEST, add_steps, adjoint_sums, cumulative, empty_gradient, sums_inside
from lba_exp.ops.exported import exported_chunkwise, power_of_two
from lba_exp.ops.inside import inside_gradients, inside_scores, is_vector
from lba_exp.ops.precision import compute_dtype, first_derivative
from lba_exp.ops.scan import GROUP, rounded, scan_states

SLICE_ELEMENTS = 2**19  # elements of the score matrices made at once in eager mode: what stays in a processor's cache
GPU_SLICE_ELEMENTS = 2**25  # the same on a GPU, which wants few large steps

STATE, ADJOINT = "state", "adjoint"


def split(x: Tensor, start: int, stop: int, chunk: int, dtype: torch.dtype) -> Tensor:
    """Tokens start..stop-1 of ``(B, L, H, D)`` as contiguous chunks ``(B, H, n, C, D)``, zeros after the end."""
    x = x[:, start:stop].to(dtype)
    missing = (stop - start + chunk - 1) // chunk * chunk - (stop - start)
    if missing:
        x = pad(x, (0, 0, 0, 0, 0, missing))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def join(x: Tensor, length: int) -> Tensor:
    """Chunks ``(B, H, n, C, D)`` as ``(B, length, H, D)``, the zeros after the end dropped."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


def split_steps(x: Tensor | None, start: int, stop: int, chunk: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """A step decay in chunks ``(B or 1, H, n or 1, C, X)``."""
    if x is None:
        return None
    if x.shape[1] < length:  # the same in every step
        x, start, stop = x.expand(-1, chunk, -1, -1), 0, chunk
    return split(x[:, start:stop].clamp_min(LOWEST), 0, stop - start, chunk, dtype)


class Chunks:
    """Where the chunks of a sequence lie, and the slices of them that eager mode works on one after the other."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int, vector: bool):
        batch, self.length, heads, _ = q.shape
        self.dtype = compute_dtype(q, k, v)
        self.size = chunk if chunk < self.length else self.length
        if vector:
            self.size = power_of_two(self.size)
        self.count = (self.length + self.size - 1) // self.size
        step = self.count
        if not torch.compiler.is_compiling():
            elements = SLICE_ELEMENTS if q.device.type == "cpu" else GPU_SLICE_ELEMENTS
            step = max(1, elements // (batch * heads * self.size**2))
            if step >= GROUP:  # with a place at each end for what comes from other slices: whole groups
                step = step // GROUP * GROUP - 2
        self.slices = [(first, min(first + step, self.count)) for first in range(0, self.count, step)]

    def tokens(self, first: int, last: int) -> tuple[int, int]:
        return first * self.size, min(last * self.size, self.length)


class _Slice:
    """The inputs of one slice in chunks; v (and the output's gradient) with the denominator as one more column."""

    def __init__(self, chunks, first, last, q, k, v, steps, with_den, grads=None):
        self.first, self.last = first, last
        self.start, self.stop = chunks.tokens(first, last)

        def cut(x):
            return split(x, self.start, self.stop, chunks.size, chunks.dtype)

        self.q = None if q is None else cut(q)
        self.k, self.v = cut(k), cut(v)
        if with_den:
            self.v = pad(self.v, (0, 1), value=1.0)
        self.steps = [split_steps(x, self.start, self.stop, chunks.size, chunks.length, chunks.dtype) for x in steps]
        self.length = self.stop - self.start
        if grads is not None:
            num, den = grads
            self.grad = cut(num) if den is None else torch.cat([cut(num), cut(den[..., None])], dim=-1)

    def sums(self, direction):
        x = self.steps[int(direction == "backward")]
        return (None, None, None) if x is None else sums_inside(x, direction == "backward")


class _Carried:
    """The states and their adjoints (STATE, ADJOINT) that go from chunk to chunk, slice by slice from the first to the last.

    What is read from left to right is carried along. What is read from right to left is summed up beforehand, one state for the border of
    each slice. So memory holds the states of one slice, and each is made, used and dropped while a processor's cache has it.
    """

    def __init__(self, chunks: Chunks, directions: tuple[str, ...], q, k, v, steps, with_den, grads=None):
        self.slices = len(chunks.slices)
        self.left: dict[tuple[str, str], Tensor] = {}
        self.right: dict[tuple[str, str], list[Tensor | float]] = {}
        kinds = [("backward", STATE)] if grads is None else [("backward", STATE), ("forward", ADJOINT)]
        kinds = [kind for kind in kinds if kind[0] in directions]
        for kind in kinds:
            self.right[kind] = [0.0] * self.slices
        for number in range(self.slices - 1, 0, -1) if kinds else ():
            x = _Slice(chunks, *chunks.slices[number], q if grads is not None else None, k, v, steps, with_den, grads)
            for kind in kinds:
                direction, name = kind
                into, onto, total = x.sums(direction)
                factors = (x.k, onto, x.v) if name == STATE else (x.q, into, x.grad)
                self.right[kind][number - 1] = _leave_to_the_left(*factors, total, self.right[kind][number])

    def enter(self, number: int, direction: str, name: str, own: Tensor, total: Tensor | None) -> Tensor:
        """What enters each chunk of slice ``number``, ``(B, H, n, Dk, Dv)``, from what each adds, ``own``."""
        count, reverse, kind = own.shape[2], (direction == "backward") == (name == STATE), (direction, name)
        edge = 0 if self.slices == 1 else 1  # a place at each end: for what comes from other slices, and for what goes to them
        x = own.new_zeros(*own.shape[:2], rounded(count + 2 * edge), *own.shape[3:])
        x[:, :, edge : edge + count] = own
        if edge:
            x[:, :, count + 1 if reverse else 0] = self.right[kind][number] if reverse else self.left.get(kind, 0.0)
            total = None if total is None else pad(total.expand(-1, -1, count, -1, -1), (0, 0, 0, 0, 1, 1))
        scan_states(x, total, reverse)
        if edge and not reverse:
            self.left[kind] = x[:, :, count + 1]
        return x[:, :, edge : edge + count]


def _leave_to_the_left(x: Tensor, exponent: Tensor | None, y: Tensor, total: Tensor | None, carry: Tensor | float) -> Tensor:
    """``(B, H, Dk, Dv)``: the sum of x y^T over a slice ``(B, H, n, C, D)`` and ``carry``, each decayed to the slice's first token.

    exponent: the decay from each token to its chunk's first; total: over each whole chunk.
    """
    if total is not None:
        totals = total.expand(-1, -1, x.shape[2], -1, -1)[..., 0, :]
        sums = pad(cumulative(totals, -2), (0, 0, 1, 0))
        exponent = exponent + sums[..., :-1, None, :]
        carry = carry * sums[..., -1:, :].exp().mT
    return decayed(x, exponent).flatten(2, 3).mT @ y.flatten(2, 3) + carry


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, forward, backward, weight, directions, with_den, chunk_size):
        ctx.save_for_backward(q, k, v, forward, backward)
        ctx.options = (weight, directions, with_den, chunk_size)
        steps = [forward, backward]
        chunks = Chunks(q, k, v, chunk_size, is_vector(*steps))
        carried = _Carried(chunks, directions, q, k, v, steps, with_den)
        num = torch.empty_like(v, dtype=chunks.dtype)
        den = v.new_empty(v.shape[:3], dtype=chunks.dtype) if with_den else None
        for number, (first, last) in enumerate(chunks.slices):
            x = _Slice(chunks, first, last, q, k, v, steps, with_den)
            out = inside_scores(x.q, x.k, *x.steps, weight, directions) @ x.v
            for direction in directions if chunks.count > 1 else ():
                into, onto, total = x.sums(direction)
                out += decayed(x.q, into) @ carried.enter(number, direction, STATE, decayed(x.k, onto).mT @ x.v, total)
            out = join(out, x.length)
            num[:, x.start : x.stop] = out[..., : v.shape[-1]]
            if with_den:
                den[:, x.start : x.stop] = out[..., -1]
        return num, den

    @staticmethod
    @first_derivative
    def backward(ctx, grad_num, grad_den):
        q, k, v, forward, backward = ctx.saved_tensors
        weight, directions, with_den, chunk_size = ctx.options
        steps, grads = [forward, backward], (grad_num, grad_den if with_den else None)
        chunks = Chunks(q, k, v, chunk_size, is_vector(*steps))
        carried = _Carried(chunks, directions, q, k, v, steps, with_den, grads)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        needed = zip(steps, ctx.needs_input_grad[3:5], strict=True)
        dsteps = [empty_gradient(x, chunks.length) if need else None for x, need in needed]
        for number, (first, last) in enumerate(chunks.slices):
            x = _Slice(chunks, first, last, q, k, v, steps, with_den, grads)
            scores, dq_part, dk_part, inside = inside_gradients(x.grad @ x.v.mT, x.q, x.k, *x.steps, weight, directions)
            dv_part = scores.mT @ x.grad
            for direction in directions:
                dstep = dsteps[int(direction == "backward")]
                dstep_part = None if dstep is None else _fit(inside[direction], dstep)
                if chunks.count > 1:
                    into, onto, total = x.sums(direction)
                    decayed_k = decayed(x.k, onto)
                    state = carried.enter(number, direction, STATE, decayed_k.mT @ x.v, total)
                    adjoint = carried.enter(number, direction, ADJOINT, decayed(x.q, into).mT @ x.grad, total)
                    dq_state = decayed(x.grad @ state.mT, into)
                    dk_state = decayed(x.v @ adjoint.mT, onto)
                    dv_part += decayed_k @ adjoint
                    dq_part += dq_state
                    dk_part += dk_state
                    if dstep is not None:  # pairs with one end in this chunk, and pairs around it
                        row, column = _fit(x.q * dq_state, dstep), _fit(x.k * dk_state, dstep)
                        around = (state * adjoint).sum(-1)[..., None, :] * total.exp()
                        dstep_part = dstep_part + adjoint_sums(row, column, direction == "backward") + _fit(around, dstep)
                if dstep is not None:
                    add_steps(dstep, join(dstep_part, x.length), x.start, x.stop)
            dq[:, x.start : x.stop] = join(dq_part, x.length)
            dk[:, x.start : x.stop] = join(dk_part, x.length)
            dv[:, x.start : x.stop] = join(dv_part[..., : v.shape[-1]], x.length)
        return dq, dk, dv, *(None if x is None else x.to(y.dtype) for x, y in zip(dsteps, steps, strict=True)), None, None, None, None


def _fit(x: Tensor, like: Tensor) -> Tensor:
    """Summed over channels where ``like`` has one value for all of them."""
    return x.sum(-1, keepdim=True) if like.shape[-1] == 1 and x.shape[-1] > 1 else x


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
    """Numerator ``(B, L, H, Dv)`` and denominator ``(B, L, H)`` in O(L C d + L d^2) work and O(L d) memory, also in training.

    Arguments as in ``parallel``. With a decay per channel the chunk is rounded up to a power of two.
    """
    if torch.compiler.is_exporting():  # the number of chunks is a symbol then
        options = {"weight": weight, "directions": directions, "with_den": with_den, "chunk_size": chunk_size}
        return exported_chunkwise(q, k, v, forward, backward, **options)
    return _Chunkwise.apply(q, k, v, forward, backward, weight, directions, with_den, chunk_size)
