"""The recurrent form: two linear recurrences, one token at a time, whose states are overwritten (arXiv 2502.16249, the RNN form).

Both directions run side by side as one batch: step t handles token t for the forward direction and token L-1-t for the backward one. A
state first decays, then is read, then takes in its token, so a read never holds the token itself; the diagonal is added once, apart.

Training keeps the states at segment borders only. Every per-token gradient of q comes from running the recurrence again, those of k and v
from the adjoint recurrence, run from the other end.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lba_exp.ops.decays import LOWEST

SEGMENT = 256  # tokens gathered at once


def shrinkage(log_decay: Tensor) -> Tensor:
    """``exp(log_decay) - 1``: adding it times the state does not drift over many steps, as multiplying by a rounded decay does."""
    return log_decay.clamp_min(LOWEST).expm1()


def advance(state: Tensor, shrink: Tensor | None, k: Tensor, v: Tensor, q: Tensor, out: Tensor) -> None:
    """Run ``T`` steps in place: state ``(N, Dk, Dv)``, shrink ``(T, N, X, 1)``, k, q ``(T, N, Dk)``, v and the reads out ``(T, N, Dv)``."""
    shrinks = [None] * len(k) if shrink is None else shrink.unbind(0)
    columns, rows = k.unsqueeze(-1).unbind(0), [x.unsqueeze(-2).unbind(0) for x in (v, q, out)]
    for shrink_t, k_t, v_t, q_t, out_t in zip(shrinks, columns, *rows, strict=True):
        if shrink_t is not None:
            state.addcmul_(state, shrink_t)
        torch.bmm(q_t, state, out=out_t)
        state.addcmul_(k_t, v_t)


def retreat(state: Tensor, shrink: Tensor | None, k: Tensor, v: Tensor, q: Tensor, grad: Tensor, dk: Tensor, dv: Tensor) -> None:
    """The adjoint of ``advance``, in place on the adjoint state: steps T-1 down to 0; writes ``dk (T, N, Dk)`` and ``dv (T, N, Dv)``."""
    for t in range(len(k) - 1, -1, -1):
        torch.bmm(state, v[t].unsqueeze(-1), out=dk[t].unsqueeze(-1))
        torch.bmm(k[t].unsqueeze(-2), state, out=dv[t].unsqueeze(-2))
        state.addcmul_(q[t].unsqueeze(-1), grad[t].unsqueeze(-2))
        if shrink is not None:
            state.addcmul_(state, shrink[t])


class _Sides:
    """Gathers a segment of steps of every direction as one batch ``(T, N, ...)``, N = directions x B x H, and scatters it back."""

    def __init__(self, directions: tuple[str, ...], batch: int, length: int, heads: int):
        self.directions, self.batch, self.length, self.heads = directions, batch, length, heads

    def _parts(self, start: int, stop: int) -> list[tuple[slice, bool]]:
        slices = {"forward": (slice(start, stop), False), "backward": (slice(self.length - stop, self.length - start), True)}
        return [slices[direction] for direction in self.directions]

    def gather(self, x: Tensor, start: int, stop: int) -> Tensor:
        parts = [x[:, where].flip(1) if flipped else x[:, where] for where, flipped in self._parts(start, stop)]
        return torch.stack(parts).permute(2, 0, 1, 3, 4).reshape(stop - start, -1, x.shape[-1])

    def decays(self, steps: list[Tensor | None], start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """``exp - 1`` of every direction's decays ``(T, N, X, 1)``; None where no direction decays."""
        used = [steps[0] if d == "forward" else steps[1] for d in self.directions]
        if all(x is None for x in used):
            return None
        width = max(1 if x is None else x.shape[-1] for x in used)
        parts = []
        for x, (where, flipped) in zip(used, self._parts(start, stop), strict=True):
            if x is None:
                device = next(y.device for y in used if y is not None)
                x = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)
            if x.shape[1] > 1:
                x = x[:, where].flip(1) if flipped else x[:, where]
            parts.append(shrinkage(x).to(dtype).expand(self.batch, stop - start, self.heads, width))
        return torch.stack(parts).permute(2, 0, 1, 3, 4).reshape(stop - start, -1, width, 1)

    def split(self, x: Tensor) -> list[tuple[str, Tensor]]:
        """``(T, N, D)`` as one ``(B, T, H, D)`` per direction, in the order in which the direction reads."""
        x = x.view(x.shape[0], len(self.directions), self.batch, self.heads, x.shape[-1]).permute(1, 2, 0, 3, 4)
        return list(zip(self.directions, x, strict=True))

    def add(self, target: Tensor, x: Tensor, start: int, stop: int) -> None:
        """Add ``(T, N, D)``, every direction to its own tokens of ``target (B, L, H, D)``."""
        for (_, part), (where, flipped) in zip(self.split(x), self._parts(start, stop), strict=True):
            target[:, where] += part.flip(1) if flipped else part


def _with_ones(v: Tensor) -> Tensor:
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, forward, backward, weight, directions, with_den):
        ctx.save_for_backward(q, k, v, forward, backward)
        ctx.options = (weight, directions, with_den)
        batch, length, heads, width = q.shape
        sides = _Sides(directions, batch, length, heads)
        columns = v.shape[-1] + with_den
        out = q.new_empty(batch, length, heads, columns)
        diagonal = weight * (q * k).sum(-1, keepdim=True)
        torch.mul(diagonal, v, out=out[..., : v.shape[-1]])
        if with_den:
            out[..., -1:] = diagonal
        state = q.new_zeros(len(directions) * batch * heads, width, columns)
        for start in range(0, length, SEGMENT):
            stop = min(start + SEGMENT, length)
            qs, ks, vs = (sides.gather(x, start, stop) for x in (q, k, v))
            vs = _with_ones(vs) if with_den else vs
            reads = torch.empty_like(vs)
            advance(state, sides.decays([forward, backward], start, stop, q.dtype), ks, vs, qs, reads)
            sides.add(out, reads, start, stop)
        return (out[..., :-1], out[..., -1]) if with_den else (out, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_num, grad_den):
        q, k, v, forward, backward = ctx.saved_tensors
        weight, directions, with_den = ctx.options
        steps = [forward, backward]
        gates = any(ctx.needs_input_grad[3:5])
        batch, length, heads, width = q.shape
        sides = _Sides(directions, batch, length, heads)

        def gather_values(start, stop):
            vs, grads = sides.gather(v, start, stop), sides.gather(grad_num, start, stop)
            if not with_den:
                return vs, grads
            return _with_ones(vs), torch.cat([grads, sides.gather(grad_den[..., None], start, stop)], dim=-1)

        # the diagonal
        grad_diagonal = weight * (grad_num * v).sum(-1, keepdim=True)
        if with_den:
            grad_diagonal = grad_diagonal + weight * grad_den[..., None]
        dq, dk = grad_diagonal * k, grad_diagonal * q
        dv = weight * (q * k).sum(-1, keepdim=True) * grad_num

        vector = any(x is not None and x.shape[-1] > 1 for x in steps)

        def per_channel(x):
            return x if vector else x.sum(-1, keepdim=True)

        starts = list(range(0, length, SEGMENT))
        borders, rows = [], []
        state = q.new_zeros(len(directions) * batch * heads, width, v.shape[-1] + with_den)
        transposed = state.mT
        for start in starts:
            stop = min(start + SEGMENT, length)
            if gates:
                borders.append(state.clone())
            qs, ks = (sides.gather(x, start, stop) for x in (q, k))
            vs, grads = gather_values(start, stop)
            reads = torch.empty_like(qs)
            # dq_t = S_t g_t: the same recurrence, read with the output's gradient
            shrink = sides.decays(steps, start, stop, q.dtype)
            shrink = None if shrink is None else shrink.mT
            advance(transposed, shrink, vs, ks, grads, reads)
            sides.add(dq, reads, start, stop)
            if gates:
                rows.append(per_channel(qs * reads))
        wanted = zip(steps, ctx.needs_input_grad[3:5], strict=True)
        dgates = [torch.zeros_like(x, dtype=torch.float64) if x is not None and need else None for x, need in wanted]
        state.zero_()
        for start in reversed(starts):
            stop = min(start + SEGMENT, length)
            qs, ks = (sides.gather(x, start, stop) for x in (q, k))
            vs, grads = gather_values(start, stop)
            dks, dvs = torch.empty_like(ks), torch.empty_like(vs)
            retreat(state, sides.decays(steps, start, stop, q.dtype), ks, vs, qs, grads, dks, dvs)
            sides.add(dk, dks, start, stop)
            sides.add(dv, dvs[..., : v.shape[-1]], start, stop)
            if gates:
                # what crosses the segment's first step; every later step adds what starts there and loses what ends there
                crossing = per_channel((state * borders.pop()).sum(-1)).double()
                change = rows.pop().double() - per_channel(ks * dks)
                crossing = crossing - torch.nn.functional.pad(change[:-1].cumsum(0), (0, 0, 0, 0, 1, 0))
                _add_gates(sides, dgates, crossing, start, stop)
        dgates = [None if x is None else x.to(y.dtype) for x, y in zip(dgates, steps, strict=True)]
        return dq, dk, dv, *dgates, None, None, None


def _add_gates(sides: _Sides, dgates: list[Tensor | None], crossing: Tensor, start: int, stop: int) -> None:
    """Add a segment's decay gradients ``(T, N, Dk)`` to each direction's, summed over the sizes it does not have."""
    for (direction, part), (where, flipped) in zip(sides.split(crossing), sides._parts(start, stop), strict=True):
        target = dgates[0] if direction == "forward" else dgates[1]
        if target is None:
            continue
        part = part.flip(1) if flipped else part
        if target.shape[-1] == 1:
            part = part.sum(-1, keepdim=True)
        if target.shape[1] > 1 or sides.length == 1:
            target[:, where] += part.sum_to_size(target.shape[0], *part.shape[1:])
        else:
            target += part.sum_to_size(target.shape)


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

    O(L d) memory, also in training: at most one state per 256 tokens is kept. Arguments as in ``parallel``.
    """
    return _Recurrent.apply(q, k, v, forward, backward, weight, directions, with_den)
