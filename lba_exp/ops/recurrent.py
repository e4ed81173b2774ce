"""The recurrent form: two linear recurrences, one token at a time, whose states are overwritten (arXiv 2502.16249, the RNN form).

Both directions run side by side as one batch: step t handles token t for the forward direction and token L-1-t for the backward one. A
state first decays, then is read, then takes in its token, so a read never holds the token itself; the diagonal is added once, apart.

Training keeps the states at segment borders only, some sqrt(L) and at least one every 64 tokens: the gradients of q come from running the
recurrence again, those of k and v from the adjoint recurrence, run from the other end; a decay's gradient is the product of the decayed
state, made again for one segment at a time, and its adjoint.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from lba_exp.ops.decays import add_steps, empty_gradient
from lba_exp.ops.precision import compute_dtype, first_derivative, no_forward_mode
from lba_exp.ops.steps import Decay, advance, decayed_states, retreat

SEGMENT = 256  # tokens gathered at once, at most
BORDER_EVERY = 64  # tokens between kept states, at most: the states between two borders stay in a processor's cache


class _Segment:
    """Some steps of every direction as one batch ``(T, N, D)``, N = directions x B x H, and back."""

    def __init__(self, start: int, stop: int, directions: tuple[str, ...], q: Tensor, dtype: torch.dtype):
        self.start, self.stop, self.directions, self.dtype = start, stop, directions, dtype
        self.batch, self.length, self.heads, _ = q.shape

    def tokens(self, direction: str) -> slice:
        if direction == "backward":
            return slice(self.length - self.stop, self.length - self.start)
        return slice(self.start, self.stop)

    def _read(self, x: Tensor, direction: str) -> Tensor:
        x = x[:, self.tokens(direction)]
        return x.flip(1) if direction == "backward" else x

    def _flat(self, parts: list[Tensor]) -> Tensor:
        x = torch.stack(parts).to(self.dtype).permute(2, 0, 1, 3, 4)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def gather(self, x: Tensor) -> Tensor:
        """``(B, L, H, D)``, each direction's tokens in the order in which it reads them."""
        return self._flat([self._read(x, direction) for direction in self.directions])

    def decay(self, steps: list[Tensor | None]) -> Decay | None:
        """The decays of all directions; None where none decays."""
        used = {direction: steps[int(direction == "backward")] for direction in self.directions}
        known = [x for x in used.values() if x is not None]
        if not known:
            return None
        shape = (self.batch, self.stop - self.start, self.heads, max(x.shape[-1] for x in known))
        parts = []
        for direction, x in used.items():
            x = known[0].new_zeros(1, 1, 1, 1) if x is None else x if x.shape[1] == 1 else self._read(x, direction)
            parts.append(x.expand(shape))
        return Decay.of(self._flat(parts)[..., None])

    def scatter(self, x: Tensor) -> dict[str, Tensor]:
        """``(T, N, D)`` as ``(B, T, H, D)`` per direction, in the order of the sequence."""
        x = x.view(x.shape[0], len(self.directions), self.batch, self.heads, x.shape[-1]).permute(1, 2, 0, 3, 4)
        return {d: part.flip(1) if d == "backward" else part for d, part in zip(self.directions, x, strict=True)}

    def add(self, target: Tensor, x: Tensor) -> None:
        """Add every direction's ``(T, N, D)`` to its own tokens of ``target (B, L, H, D)``."""
        for direction, part in self.scatter(x).items():
            target[:, self.tokens(direction)] += part


def _segments(directions: tuple[str, ...], q: Tensor, dtype: torch.dtype, size: int) -> list[_Segment]:
    length = q.shape[1]
    return [_Segment(start, min(start + size, length), directions, q, dtype) for start in range(0, length, size)]


def _with_den(x: Tensor, den: Tensor | float) -> Tensor:
    """``(..., D)`` with one more column for the denominator."""
    return torch.cat([x, den], dim=-1) if isinstance(den, Tensor) else pad(x, (0, 1), value=den)


# One opaque operation for torch.compile: a traced loop would unroll every token into the graph.
@torch.library.custom_op("lba_exp::recurrent", mutates_args=())
def _run(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor | None, backward: Tensor | None, weight: float, direction: str, with_den: bool
) -> tuple[Tensor, Tensor]:
    """num and den (empty without) of the checked arguments; ``direction``: the names of one or both, joined by a comma."""
    directions = tuple(direction.split(","))
    num, den = _outputs(q, k, v, with_den)
    segments = _segments(directions, q, num.dtype, SEGMENT)
    for segment in segments:
        own = slice(segment.start, segment.stop)
        diagonal = weight * (q[:, own].to(num.dtype) * k[:, own].to(num.dtype)).sum(-1, keepdim=True)
        num[:, own] = diagonal * v[:, own].to(num.dtype)
        if with_den:
            den[:, own] = diagonal[..., 0]
    state = num.new_zeros(len(directions) * q.shape[0] * q.shape[2], q.shape[3], v.shape[3] + with_den)
    for segment in segments:
        qs, ks, vs = segment.gather(q), segment.gather(k), segment.gather(v)
        vs = _with_den(vs, 1.0) if with_den else vs
        reads = torch.empty_like(vs)
        advance(state, segment.decay([forward, backward]), ks, vs, qs, reads)
        segment.add(num, reads[..., : v.shape[3]])
        if with_den:
            segment.add(den[..., None], reads[..., -1:])
    return num, den


def _outputs(q: Tensor, k: Tensor, v: Tensor, with_den: bool) -> tuple[Tensor, Tensor]:
    num = v.new_empty(v.shape, dtype=compute_dtype(q, k, v))
    return num, num.new_empty(v.shape[:3] if with_den else 0)


@_run.register_fake
def _(q, k, v, forward, backward, weight, direction, with_den):
    return _outputs(q, k, v, with_den)


@torch.library.custom_op("lba_exp::recurrent_backward", mutates_args=())
def _run_backward(
    grad_num: Tensor,
    grad_den: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward: Tensor | None,
    backward: Tensor | None,
    weight: float,
    direction: str,
    forward_needed: bool,
    backward_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and both decays (empty where not needed)."""
    directions = tuple(direction.split(","))
    steps, needed, with_den = [forward, backward], (forward_needed, backward_needed), grad_den is not None
    dsteps = [empty_gradient(x, q.shape[1]) if need else None for x, need in zip(steps, needed, strict=True)]
    gates = any(needed)
    dtype = compute_dtype(q, k, v)
    dq, dk, dv = (torch.empty_like(x, dtype=dtype) for x in (q, k, v))
    # as many borders as steps between them, until the steps between them would leave the cache
    segments = _segments(directions, q, dtype, min(BORDER_EVERY, math.isqrt(q.shape[1] - 1) + 1) if gates else SEGMENT)

    def values(segment):
        vs, grads = segment.gather(v), segment.gather(grad_num)
        return (_with_den(vs, 1.0), _with_den(grads, segment.gather(grad_den[..., None]))) if with_den else (vs, grads)

    for segment in segments:
        own = slice(segment.start, segment.stop)
        q_own, k_own, v_own, grad_own = (x[:, own].to(dtype) for x in (q, k, v, grad_num))
        change = (grad_own * v_own).sum(-1, keepdim=True)
        change = weight * (change + grad_den[:, own, :, None] if with_den else change)
        dq[:, own], dk[:, own] = change * k_own, change * q_own
        dv[:, own] = weight * (q_own * k_own).sum(-1, keepdim=True) * grad_own

    state = dq.new_zeros(len(directions) * q.shape[0] * q.shape[2], q.shape[3], v.shape[3] + with_den)
    borders = []
    for segment in segments:
        qs, ks, (vs, grads) = segment.gather(q), segment.gather(k), values(segment)
        borders.append(state.clone() if gates else None)
        decay = segment.decay(steps)
        reads = torch.empty_like(qs)
        # dq_t = S_t grad_t: the same recurrence with k and v in each other's place
        advance(state.mT, None if decay is None else decay.mT, vs, ks, grads, reads)
        segment.add(dq, reads)
    state.zero_()
    room = state.new_empty(segments[0].stop if gates else 0, *state.shape)
    for segment in reversed(segments):
        qs, ks, (vs, grads) = segment.gather(q), segment.gather(k), values(segment)
        dks, dvs, decay = torch.empty_like(ks), torch.empty_like(vs), segment.decay(steps)
        border, extra = borders.pop(), ()
        if gates:
            extra = decayed_states(border, decay, ks, vs, room[: len(ks)]), ks.new_empty(decay.change.shape[:3])
        retreat(state, decay, ks, vs, qs, grads, dks, dvs, *extra)
        segment.add(dk, dks)
        segment.add(dv, dvs[..., : v.shape[-1]])
        if gates:
            for name, part in segment.scatter(extra[1]).items():
                _add(dsteps[name == "backward"], part, segment.tokens(name))
    dsteps = [q.new_empty(0) if x is None else x.to(y.dtype) for x, y in zip(dsteps, steps, strict=True)]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *dsteps


@_run_backward.register_fake
def _(grad_num, grad_den, q, k, v, forward, backward, weight, direction, forward_needed, backward_needed):
    steps = zip((forward, backward), (forward_needed, backward_needed), strict=True)
    return *map(torch.empty_like, (q, k, v)), *(torch.empty_like(x) if need else q.new_empty(0) for x, need in steps)


def _keep(ctx, inputs, output):
    *tensors, ctx.weight, ctx.direction, ctx.with_den = inputs
    ctx.save_for_backward(*tensors)


@first_derivative
def _gradients(ctx, grad_num, grad_den):
    needed = ctx.needs_input_grad[3:5]
    dq, dk, dv, *dsteps = _run_backward(
        grad_num, grad_den if ctx.with_den else None, *ctx.saved_tensors, ctx.weight, ctx.direction, *needed
    )
    return dq, dk, dv, *(x if need else None for x, need in zip(dsteps, needed, strict=True)), None, None, None


_run.register_autograd(_gradients, setup_context=_keep)


def _add(target: Tensor | None, part: Tensor, tokens: slice) -> None:
    if target is not None:
        part = part.sum(-1, keepdim=True) if target.shape[-1] == 1 and part.shape[-1] > 1 else part
        add_steps(target, part, tokens.start, tokens.stop)


def recurrent(
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
    """Numerator ``(B, L, H, Dv)`` and denominator ``(B, L, H)``, one token at a time; ``chunk_size`` has no meaning here.

    O(L d) memory, also in training, which keeps a state every 64 tokens, and those between two borders while it works there. Arguments
    as in ``parallel``.
    """
    no_forward_mode(q, k, v, forward, backward)
    num, den = _run(q, k, v, forward, backward, weight, ",".join(directions), with_den)
    return num, den if with_den else None
