"""Single steps of the recurrence and of its adjoint on flat tensors, states overwritten: what runs the recurrent form and streaming."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lba_exp.ops.decays import LOWEST


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


def decayed_states(state: Tensor, decay: Decay, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """The state as each of ``T`` steps reads it, in ``out (T, N, Dk, Dv)``; arguments as in ``advance``, ``state`` is overwritten."""
    for state_t, decay_t, k_t, v_t in zip(out, decay.steps(), k.unsqueeze(-1), v.unsqueeze(-2), strict=True):
        _decay(state, decay_t, out=state_t)
        torch.addcmul(state_t, k_t, v_t, out=state)
    return out


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
