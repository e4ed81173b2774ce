"""The delta rule, bidirectional, with or without decay: a linear operator whose state is corrected by what it holds already."""

import math

import torch
from torch import Tensor

from lba_exp.ops.api import DIRECTIONS, check_arguments, hide_padding
from lba_exp.ops.checks import FLOATS, choice
from lba_exp.ops.delta_chunks import delta_chunks
from lba_exp.ops.precision import compute_dtype, first_derivative, no_autocast, no_forward_mode
from lba_exp.ops.steps import Decay

DELTA_FORMS = ("parallel", "recurrent", "chunkwise", "auto")
PARALLEL_UP_TO = 128  # measured, see ``bidirectional_delta_rule``
BORDER_EVERY = 64  # tokens between kept states, at most


def check_beta(beta: Tensor, q: Tensor) -> None:
    """Raise unless ``beta`` is a floating ``(B, L, H)`` on the device of q; in eager mode on the CPU also for values outside [0, 2]."""
    shape = tuple(q.shape[:3])
    if not isinstance(beta, Tensor) or tuple(beta.shape) != shape:
        got = tuple(beta.shape) if isinstance(beta, Tensor) else type(beta).__name__
        raise ValueError(f"beta: expected a tensor (B, L, H) = {shape}, got {got}")
    if beta.dtype not in FLOATS:
        raise ValueError(f"beta: expected float64, float32, bfloat16 or float16, got {beta.dtype}")
    if beta.device != q.device:
        raise ValueError(f"beta: expected the device of q, {q.device}, got {beta.device}")
    # reading values would synchronise a GPU or break a compiled graph; NaN passes, as in log decays
    if beta.device.type == "cpu" and not torch.compiler.is_compiling() and bool(((beta.detach() < 0) | (beta.detach() > 2)).any()):
        low, high = beta.detach().min().item(), beta.detach().max().item()
        raise ValueError(f"beta: expected values from 0 to 2, got some from {low:g} to {high:g}")


def _check(q, k, v, beta, forward_log_decay, backward_log_decay, diagonal_weight, direction, padding_mask, form, chunk_size) -> None:
    check_arguments(
        q, k, v, forward_log_decay, backward_log_decay, diagonal_weight, direction, padding_mask, "auto", chunk_size, None
    )
    for name, x in (("forward_log_decay", forward_log_decay), ("backward_log_decay", backward_log_decay)):
        if x is not None and x.ndim not in (1, 3):
            raise ValueError(f"{name}: the delta rule takes one decay per head, (H,) or (B, L, H), got {tuple(x.shape)}")
    check_beta(beta, q)
    if form == "fused":
        raise ValueError(f"form: the delta rule has no fused form, valid are {', '.join(map(repr, DELTA_FORMS))}")
    choice("form", form, DELTA_FORMS)


def bidirectional_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    forward_log_decay: Tensor | None = None,
    backward_log_decay: Tensor | None = None,
    *,
    diagonal_weight: float = 1.0,
    direction: str = "both",
    padding_mask: Tensor | None = None,
    form: str = "auto",
    chunk_size: int = 64,
) -> Tensor:
    """The (gated) delta rule in both directions (DeltaNet, arXiv 2406.06484, equation of section 2.2; gated arXiv 2412.06464, equation 10).

    With f_i = exp(forward_log_decay_i), b_i = exp(backward_log_decay_i) and w = diagonal_weight::

        S^F_i = f_i (I - beta_i k_i k_i^T) S^F_{i-1} + beta_i k_i v_i^T
        S^B_i = b_i (I - beta_i k_i k_i^T) S^B_{i+1} + beta_i k_i v_i^T
        y_i   = q_i^T S^F_i + q_i^T S^B_i + (w - 2) beta_i (q_i . k_i) v_i        one direction: q_i^T S_i + (w - 1) beta_i (q_i . k_i) v_i

    so that what a token writes for itself counts w times in all. States stay bounded where beta_i |k_i|^2 <= 2: give keys of length 1.
    Nothing divides by sqrt(Dk): scale q where that is wanted.

    q, k: ``(B, L, H, Dk)``; v: ``(B, L, H, Dv)``; float64, float32, bfloat16 or float16. The work is done in float32, in float64 where one
        of them is float64, whatever ``torch.autocast`` says.
    beta: ``(B, L, H)``, any of these dtypes, from 0 (writes nothing) over 1 (replaces what is stored under k) to 2.
    forward_log_decay, backward_log_decay: None (no decay), fixed ``(H,)`` or selective ``(B, L, H)``; values <= 0, float32 (float64 beside
        float64 inputs). For one gate per token: ``step_log_decays(log_gate, "query")``.
    diagonal_weight: w; 1 counts the diagonal once, 2 is the plain sum of both directions.
    direction: "both", "forward" (only S^F) or "backward" (only S^B).
    padding_mask: bool ``(B, L)``, True = real token. Padded tokens write and erase nothing, and their output is 0; their decays still
        count, so padding at either end equals cutting it off.
    form: "parallel" (one triangular solve over all tokens, O(L^2) memory), "recurrent" (token by token, states overwritten; O(L d) memory
        in training, too), "chunkwise" (a solve per chunk, states carried between chunks) or "auto": "parallel" up to 128 tokens, else
        "chunkwise". All give the same results. The recurrent form has first derivatives only, and forward mode (jvp) no form with decays.
        The rule was measured on one CPU core (float32, chunk 64, D = 32 and 64, forward alone and with backward).
    chunk_size: tokens a chunk in the chunkwise form; not a part of the result.

    Returns ``(B, L, H, Dv)`` in the dtype of v. Raises ValueError, naming the argument, for shapes, dtypes, devices and names that do not
    fit (decays per channel and ``form="fused"`` among them), and in eager mode on CPU for decays above 0 and beta outside [0, 2].
    """
    _check(q, k, v, beta, forward_log_decay, backward_log_decay, diagonal_weight, direction, padding_mask, form, chunk_size)
    directions, dtype = DIRECTIONS[direction], compute_dtype(q, k, v)
    if form == "auto":
        form = "parallel" if q.shape[1] <= PARALLEL_UP_TO else "chunkwise"
    out_dtype = v.dtype
    with no_autocast(q.device):
        if padding_mask is not None:
            q, k, v = hide_padding(q, k, v, padding_mask)
            beta = beta.masked_fill(~padding_mask[:, :, None], 0)
        q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
        decays = {"forward": forward_log_decay, "backward": backward_log_decay}
        decay = _steps([decays[name] for name in directions], beta)
        steps_first = form == "recurrent"
        rows = [_in_reading_order([x] * len(directions), directions, steps_first) for x in (q, k, v, beta)]
        rows.append(None if decay is None else _in_reading_order(decay, directions, steps_first))
        if form == "recurrent":
            no_forward_mode(*rows)
            y = _run(*rows[:4], None if decay is None else rows[4].to(dtype)).transpose(0, 1)
        else:
            y = delta_chunks(*rows, q.shape[1] if form == "parallel" else chunk_size)
        y = y.unflatten(0, (len(directions), q.shape[0], q.shape[2])).transpose(2, 3)
        y = sum(part.flip(1) if name == "backward" else part for name, part in zip(directions, y.unbind(0), strict=True))
        if diagonal_weight != len(directions):
            own = beta * (q * k).sum(-1)
            y = y + (diagonal_weight - len(directions)) * own[..., None] * v
        return y.to(out_dtype)


def _steps(decays: list[Tensor | None], beta: Tensor) -> list[Tensor] | None:
    """The log decays of all directions as float64 ``(B, L, H)`` each; None where no direction decays."""
    if all(x is None for x in decays):
        return None
    # float64 before the expansion: a fixed decay's gradient is a sum over all tokens
    return [torch.zeros_like(beta, dtype=torch.float64) if x is None else x.double().expand(beta.shape) for x in decays]


def _in_reading_order(parts: list[Tensor], directions: tuple[str, ...], steps_first: bool) -> Tensor:
    """One ``(B, L, H, ...)`` for each direction, tokens in the order in which it reads them: ``(N, L, ...)``, N = directions x B x H, or
    ``(L, N, ...)``."""
    x = torch.stack([x.flip(1) if name == "backward" else x for name, x in zip(directions, parts, strict=True)])
    return x.movedim(2, 0).flatten(1, 3) if steps_first else x.transpose(2, 3).flatten(0, 2)


# Opaque to torch.compile: a traced loop would unroll every token into the graph.
@torch.library.custom_op("lba_exp::delta_rule", mutates_args=())
def _run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> Tensor:
    """q_t^T S_t, ``(L, N, Dv)``, of one direction: q, k ``(L, N, Dk)``, v ``(L, N, Dv)``, beta and log_decay ``(L, N)``."""
    out = torch.empty_like(v)
    state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
    _advance(state, k, v, beta, _decays(log_decay, 0, len(v)), q=q, reads=out)
    return out


@_run.register_fake
def _(q, k, v, beta, log_decay):
    return torch.empty_like(v)


def _decays(log_decay: Tensor | None, start: int, stop: int) -> list[tuple[Tensor | None, Tensor]] | None:
    """(keep, change) of each step: a state becomes keep * state + change * state."""
    return None if log_decay is None else Decay.of(log_decay[start:stop, :, None, None]).steps()


def _decay(state: Tensor, step: tuple[Tensor | None, Tensor]) -> None:
    keep, change = step
    torch.addcmul(state if keep is None else state * keep, state, change, out=state)


def _advance(
    state: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decays: list[tuple[Tensor | None, Tensor]] | None,
    *,
    q: Tensor | None = None,
    reads: Tensor | None = None,
    states: Tensor | None = None,
    misses: Tensor | None = None,
) -> None:
    """Run ``T`` steps in place on ``state (N, Dk, Dv)``.

    Writes, where given, ``reads (T, N, Dv)`` = q^T S_t; or ``states (T, N, Dk, Dv)``, each as it is after its decay and before its write,
    and ``misses (T, N, Dv)``, v less what the state held for k.
    """
    miss = v.new_empty(v.shape[1], 1, v.shape[2])
    for t in range(len(k)):
        if decays is not None:
            _decay(state, decays[t])
        if states is not None:
            states[t].copy_(state)
            miss = misses[t][:, None]
        torch.baddbmm(v[t][:, None], k[t][:, None], state, alpha=-1, out=miss)
        state.addcmul_(k[t][..., None], beta[t][:, None, None] * miss)
        if reads is not None:
            torch.bmm(q[t][:, None], state, out=reads[t][:, None])


@torch.library.custom_op("lba_exp::delta_rule_backward", mutates_args=())
def _run_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta and log_decay (empty without).

    States are kept at the borders of segments only; those in between are made again for one segment at a time.
    """
    length, rows = beta.shape
    size = min(BORDER_EVERY, math.isqrt(length - 1) + 1)
    segments = [(start, min(start + size, length)) for start in range(0, length, size)]
    dq, dk, dv, dbeta = (torch.empty_like(x) for x in (q, k, v, beta))
    dsteps = beta.new_empty(0) if log_decay is None else torch.empty_like(beta)
    state, borders = v.new_zeros(rows, k.shape[2], v.shape[2]), []
    for start, stop in segments:
        borders.append(state.clone())
        if stop < length:
            _advance(state, *(x[start:stop] for x in (k, v, beta)), _decays(log_decay, start, stop))
    adjoint = torch.zeros_like(state)
    room = state.new_empty(segments[0][1], *state.shape)
    for (start, stop), border in zip(reversed(segments), reversed(borders), strict=True):
        own = slice(start, stop)
        states, misses, decays = room[: stop - start], torch.empty_like(v[own]), _decays(log_decay, start, stop)
        _advance(border, k[own], v[own], beta[own], decays, states=states, misses=misses)
        writes = beta[own, :, None] * misses
        for t in reversed(range(start, stop)):
            state_t, write = states[t - start], writes[t - start]
            adjoint.addcmul_(q[t][..., None], grad[t][:, None])
            torch.bmm(adjoint, write[..., None], out=dk[t][..., None])
            dwrite = k[t][:, None] @ adjoint
            dbeta[t] = torch.linalg.vecdot(dwrite[:, 0], misses[t - start])
            torch.mul(dwrite[:, 0], beta[t][:, None], out=dv[t])
            adjoint.addcmul_(k[t][..., None], dv[t][:, None], value=-1)
            if decays is not None:
                dsteps[t] = torch.linalg.vecdot(adjoint.flatten(1), state_t.flatten(1))
                _decay(adjoint, decays[t - start])
        # reads see the write, what is erased is measured before it
        overlap = torch.linalg.vecdot(writes, grad[own])[..., None]
        dq[own] = (states @ grad[own][..., None])[..., 0] + overlap * k[own]
        dk[own] -= (states @ dv[own][..., None])[..., 0]
    return dq, dk, dv, dbeta, dsteps


@_run_backward.register_fake
def _(grad, q, k, v, beta, log_decay):
    return *map(torch.empty_like, (q, k, v, beta)), beta.new_empty(0) if log_decay is None else torch.empty_like(beta)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


@first_derivative
def _gradients(ctx, grad):
    *grads, dsteps = _run_backward(grad.contiguous(), *ctx.saved_tensors)
    return *grads, dsteps if ctx.needs_input_grad[4] else None


_run.register_autograd(_gradients, setup_context=_keep)
