"""The recurrent form step by step: a sequence that comes in blocks of any length, in either direction, with one state in memory.

    state = start_state(batch, heads, key_width, value_width)
    for block in blocks:                          # backward: the last block first, each block in its natural order
        num, den, state = stream(state, q, k, v, log_decay, direction="forward")

The sum of both directions' ``num`` and ``den`` is what ``bidirectional_linear_attention_parts`` gives for the whole sequence.
"""

import torch
from torch import Tensor

from lba_exp.ops import checks
from lba_exp.ops.decays import to_steps
from lba_exp.ops.exported import exported_step
from lba_exp.ops.precision import compute_dtype, no_autocast, no_forward_mode
from lba_exp.ops.steps import Decay, advance


def start_state(
    batch: int,
    heads: int,
    key_width: int,
    value_width: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The empty state of one direction: zeros ``(B, H, Dk, Dv + 1)``, S beside z (its last column); float64 for float64 inputs.

    A plain tensor: save it, move it, count its bytes. Raises ValueError for a size below 1 or another dtype.
    """
    for name, value in (("batch", batch), ("heads", heads), ("key_width", key_width), ("value_width", value_width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    return torch.zeros(batch, heads, key_width, value_width + 1, dtype=dtype, device=device)


def stream(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    direction: str,
    diagonal_weight: float = 0.5,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take in the next ``n >= 1`` tokens of one direction (arXiv 2502.16249, the recurrences of S and z): (num, den, next state).

    state: what ``start_state`` or the last call gave; not changed.
    q, k, v: ``(B, n, H, Dk)``, ``(B, n, H, Dk)``, ``(B, n, H, Dv)`` in their natural order; direction "backward" reads them from the last.
    log_decay: this direction's decay, as in ``bidirectional_linear_attention``, of these tokens: ``None``, ``(H,)``, ``(H, Dk)``,
        ``(B, n, H)`` or ``(B, n, H, Dk)``. The one at the cut (forward: the block's first, backward: its last) enters: it decays the
        state. ``step_log_decays(..., before=, after=)`` makes it.
    direction: "forward" or "backward".
    diagonal_weight: this direction's share of the token itself; 0.5 in each direction makes 1. For one direction alone give 1.
    padding_mask: bool ``(B, n)``, True = real token.

    Returns num ``(B, n, H, Dv)``, den ``(B, n, H)`` and the next state, in the state's dtype. For inference: no gradients; raises
    ValueError where an input asks for one (outside ``torch.no_grad()``), and for shapes, dtypes and names that do not fit.
    """
    checks.check_tensors(q, k, v)
    checks.choice("direction", direction, ("forward", "backward"))
    checks.number("diagonal_weight", diagonal_weight)
    checks.check_padding(padding_mask, q)
    dtype = compute_dtype(q, k, v)
    checks.check_decay("log_decay", log_decay, q, double=dtype == torch.float64)
    batch, _, heads, width = q.shape
    expected = (batch, heads, width, v.shape[-1] + 1)
    if not isinstance(state, Tensor) or tuple(state.shape) != expected or state.dtype != dtype or state.device != q.device:
        got = f"{tuple(state.shape)} {state.dtype} on {state.device}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"state: expected a tensor {expected} {dtype} on {q.device}, got {got}")
    for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("state", state)):
        if torch.is_grad_enabled() and x is not None and x.requires_grad:
            raise ValueError(f"{name}: streaming gives no gradients; call it under torch.no_grad() or give {name}.detach()")
    no_forward_mode(state, q, k, v, log_decay)
    with no_autocast(q.device):
        if padding_mask is not None:
            q, k, v = (x.masked_fill(~padding_mask[:, :, None, None], 0) for x in (q, k, v))
        advance_by = exported_step if torch.compiler.is_exporting() else _advance
        return advance_by(state, q, k, v, to_steps(log_decay), direction == "backward", float(diagonal_weight))


# opaque to torch.compile, as the recurrent form is
@torch.library.custom_op("lba_exp::stream", mutates_args=())
def _advance(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, step: Tensor | None, reverse: bool, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = q.shape
    q, k = q.to(state.dtype), k.to(state.dtype)
    v = torch.nn.functional.pad(v.to(state.dtype), (0, 1), value=1.0)

    def flat(x):  # (B, n, H, D) to (n, B H, D), in reading order
        return (x.flip(1) if reverse else x).transpose(0, 1).flatten(1, 2)

    decay = None if step is None else Decay.of(flat(step.expand(batch, length, heads, -1))[..., None])
    following = state.clone(memory_format=torch.contiguous_format)
    reads = torch.empty_like(flat(v))
    advance(following.view(batch * heads, width, -1), decay, flat(k), flat(v), flat(q), reads)
    reads = reads.unflatten(1, (batch, heads)).transpose(0, 1)
    out = weight * (q * k).sum(-1, keepdim=True) * v + (reads.flip(1) if reverse else reads)
    return *(x.clone(memory_format=torch.contiguous_format) for x in (out[..., :-1], out[..., -1])), following


@_advance.register_fake
def _(state, q, k, v, step, reverse, weight):
    return state.new_empty(v.shape), state.new_empty(v.shape[:3]), state.new_empty(state.shape)
