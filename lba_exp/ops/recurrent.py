"""The recurrent form: two linear recurrences, one token at a time, whose states are overwritten (arXiv 2502.16249, the RNN form).

Both directions run side by side as one batch: step t handles token t for the forward direction and token L-1-t for the backward one. A
state first decays, then is read, then takes in its token, so a read never holds the token itself; the diagonal is added once, apart.

Training keeps the states at about sqrt(L) segment borders only: the gradients of q come from running the recurrence again, those of k and
v from the adjoint recurrence, run from the other end; a decay's gradient is the product of the decayed state, made again for one segment at
a time, and its adjoint.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lba_exp.ops.decays import LOWEST, add_steps, empty_gradient
from lba_exp.ops.precision import compute_dtype, without_autocast

SEGMENT = 256  # tokens gathered at once, at most


class Decay(NamedTuple):
    """The decays of ``T`` steps, ``(T, N, X, 1)``: a state becomes ``keep * state + change * state``; no ``keep``: it is 1."""

    keep: Tensor | None
    change: Tensor

    @classmethod
    def of(cls, log_decay: Tensor) -> "Decay":
        """f near 1 as ``1 + expm1(log f)``, which does not drift over many steps as a rounded f does; small f as it is, which is exact."""
        log_decay = log_decay.clamp_min(LOWEST)
        near = log_decay > -math.log(2)
        change = torch.where(near, log_decay.expm1(), log_decay.exp())
        return cls(None if bool(near.all()) else near.to(change.dtype), change)

    def steps(self) -> list[tuple[Tensor | None, Tensor]]:
        keeps = [None] * len(self.change) if self.keep is None else self.keep.unbind(0)
        return list(zip(keeps, self.change.unbind(0), strict=True))

    @property
    def mT(self) -> "Decay":
        return Decay(None if self.keep is None else self.keep.mT, self.change.mT)


def _decay(state: Tensor, step: tuple[Tensor | None, Tensor], out: Tensor) -> None:
    keep, change = step
    torch.addcmul(state if keep is None else state * keep, state, change, out=out)


def advance(state: Tensor, decay: Decay | None, k: Tensor, v: Tensor, q: Tensor, out: Tensor) -> None:
    """Run ``T`` steps in place: state ``(N, Dk, Dv)``, k, q ``(T, N, Dk)``, v and the reads out ``(T, N, Dv)``."""
    decays = [None] * len(k) if decay is None else decay.steps()
    columns, rows = k.unsqueeze(-1).unbind(0), [x.unsqueeze(-2).unbind(0) for x in (v, q, out)]
    for decay_t, k_t, v_t, q_t, out_t in zip(decays, columns, *rows, strict=True):
        if decay_t is not None:
            _decay(state, decay_t, out=state)
        torch.bmm(q_t, state, out=out_t)
        state.addcmul_(k_t, v_t)


def decayed_states(state: Tensor, decay: Decay, k: Tensor, v: Tensor) -> Tensor:
    """The state as each of ``T`` steps reads it, ``(T, N, Dk, Dv)``; arguments as in ``advance``, ``state`` is not changed."""
    states = state.new_empty(len(k), *state.shape)
    state = state.clone()
    for state_t, decay_t, k_t, v_t in zip(states, decay.steps(), k.unsqueeze(-1), v.unsqueeze(-2), strict=True):
        _decay(state, decay_t, out=state_t)
        torch.addcmul(state_t, k_t, v_t, out=state)
    return states


def retreat(
    state: Tensor,
    decay: Decay | None,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    grad: Tensor,
    dk: Tensor,
    dv: Tensor,
    states: Tensor | None = None,
    dsteps: Tensor | None = None,
) -> None:
    """The adjoint of ``advance``, in place on the state's adjoint: steps T-1 to 0; writes ``dk (T, N, Dk)`` and ``dv (T, N, Dv)``.

    Given the ``decayed_states``, the gradients of the steps' log decays too, ``dsteps (T, N, Dk or 1)``.
    """
    decays = [None] * len(k) if decay is None else decay.steps()
    columns = [x.unsqueeze(-1).unbind(0) for x in (v, dk, q)]
    rows = [x.unsqueeze(-2).unbind(0) for x in (k, dv, grad)]
    extra = [[None] * len(k)] * 2 if states is None else [states.unbind(0), dsteps.unbind(0)]
    steps = list(zip(decays, *columns, *rows, *extra, strict=True))
    for decay_t, v_t, dk_t, q_t, k_t, dv_t, grad_t, state_t, dstep_t in reversed(steps):
        torch.bmm(state, v_t, out=dk_t)
        torch.bmm(k_t, state, out=dv_t)
        state.addcmul_(q_t, grad_t)
        if state_t is not None:
            # one dot product for each decay
            rows_t = (x.view(dstep_t.numel(), 1, -1) for x in (state, state_t))
            torch.bmm(next(rows_t), next(rows_t).mT, out=dstep_t.view(-1, 1, 1))
        if decay_t is not None:
            _decay(state, decay_t, out=state)


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
        used = {direction: steps[direction == "backward"] for direction in self.directions}
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


def _segments(directions: tuple[str, ...], q: Tensor, dtype: torch.dtype, size: int = SEGMENT) -> list[_Segment]:
    length = q.shape[1]
    return [_Segment(start, min(start + size, length), directions, q, dtype) for start in range(0, length, size)]


def _with_den(x: Tensor, den: Tensor | float) -> Tensor:
    """``(..., D)`` with one more column for the denominator."""
    return torch.cat([x, den], dim=-1) if isinstance(den, Tensor) else pad(x, (0, 1), value=den)


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, forward, backward, weight, directions, with_den):
        ctx.save_for_backward(q, k, v, forward, backward)
        ctx.options = (weight, directions, with_den)
        batch, length, heads, width = q.shape
        dtype = compute_dtype(q, k, v)
        out = q.new_empty(batch, length, heads, v.shape[-1] + with_den, dtype=dtype)
        segments = _segments(directions, q, dtype)
        for segment in segments:
            own = slice(segment.start, segment.stop)
            diagonal = weight * (q[:, own].to(dtype) * k[:, own].to(dtype)).sum(-1, keepdim=True)
            values = v[:, own].to(dtype)
            out[:, own] = diagonal * (_with_den(values, 1.0) if with_den else values)
        state = q.new_zeros(len(directions) * batch * heads, width, out.shape[-1], dtype=dtype)
        for segment in segments:
            qs, ks, vs = segment.gather(q), segment.gather(k), segment.gather(v)
            vs = _with_den(vs, 1.0) if with_den else vs
            reads = torch.empty_like(vs)
            advance(state, segment.decay([forward, backward]), ks, vs, qs, reads)
            segment.add(out, reads)
        # the denominator apart: what keeps it for training need not keep the numerator
        return (out[..., :-1], out[..., -1].clone()) if with_den else (out, None)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_num, grad_den):
        q, k, v, forward, backward = ctx.saved_tensors
        weight, directions, with_den = ctx.options
        steps = [forward, backward]
        needed = zip(steps, ctx.needs_input_grad[3:5], strict=True)
        dsteps = [empty_gradient(x, q.shape[1]) if need else None for x, need in needed]
        gates = any(dsteps[direction == "backward"] is not None for direction in directions)
        dtype = compute_dtype(q, k, v)
        dq, dk, dv = (torch.empty_like(x, dtype=dtype) for x in (q, k, v))
        # as many borders as steps between them
        segments = _segments(directions, q, dtype, min(SEGMENT, math.isqrt(q.shape[1] - 1) + 1) if gates else SEGMENT)

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
        for segment in reversed(segments):
            qs, ks, (vs, grads) = segment.gather(q), segment.gather(k), values(segment)
            dks, dvs, decay = torch.empty_like(ks), torch.empty_like(vs), segment.decay(steps)
            border, extra = borders.pop(), ()
            if gates:
                extra = decayed_states(border, decay, ks, vs), ks.new_empty(decay.change.shape[:3])
            retreat(state, decay, ks, vs, qs, grads, dks, dvs, *extra)
            segment.add(dk, dks)
            segment.add(dv, dvs[..., : v.shape[-1]])
            if gates:
                for direction, part in segment.scatter(extra[1]).items():
                    _add(dsteps[direction == "backward"], part, segment.tokens(direction))
        dsteps = [None if x is None else x.to(y.dtype) for x, y in zip(dsteps, steps, strict=True)]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *dsteps, None, None, None


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

    O(L d) memory, also in training, which keeps some 2 sqrt(L) states. Arguments as in ``parallel``.
    """
    return _Recurrent.apply(q, k, v, forward, backward, weight, directions, with_den)
