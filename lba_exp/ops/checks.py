"""What the operator accepts. Every mistake is a ValueError that names the argument, what was given and what is valid."""

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_UNCHECKED = ContextVar("unchecked_decays", default=False)


@contextmanager
def unchecked_decays() -> Iterator[None]:
    """Let log decays above 0 pass inside: for the paper's ablation with a growing gate, in the parallel form, where nothing bounds it."""
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def choice(name: str, value: object, valid: Sequence[str]) -> None:
    """Raise unless ``value`` is one of the names in ``valid``."""
    if not isinstance(value, str) or value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: got {value!r}, valid are {', '.join(map(repr, valid))}{hint}")


def number(name: str, value: object, *, least: float = -math.inf) -> None:
    """Raise unless ``value`` is a finite Python number, at least ``least`` (eager mode only)."""
    if torch.compiler.is_compiling():
        return  # a number may be symbolic there
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        bound = "" if least == -math.inf else f" >= {least:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {value!r}")


def check_log_decay(name: str, x: object, *, values: bool = True) -> None:
    """Raise unless ``x`` is a log decay: a float32 or float64 tensor of rank 1 to 4; in eager mode on the CPU also for positive values.

    NaN passes, and comes out as NaN, as from any function of torch: a training that diverges is noticed by its loss.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected None or a tensor, got {type(x).__name__}")
    if not 1 <= x.ndim <= 4:
        raise ValueError(f"{name}: expected shape (H,), (H, Dk), (B, L, H) or (B, L, H, Dk), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: expected dtype torch.float32 (torch.float64 for float64 inputs), got {x.dtype}")
    # reading values would synchronise a GPU or break a compiled graph
    values = values and x.device.type == "cpu" and not torch.compiler.is_compiling() and not _UNCHECKED.get()
    if values and bool((x.detach() > 0).any()):
        raise ValueError(f"{name}: expected log decays <= 0, got a largest value of {x.detach().max().item():g}")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q, k ``(B, L, H, Dk)`` and v ``(B, L, H, Dv)`` are floating-point tensors of one device that fit together."""
    for name, x, layout in (("q", q, "(B, L, H, Dk)"), ("k", k, "(B, L, H, Dk)"), ("v", v, "(B, L, H, Dv)")):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor {layout}, got {type(x).__name__}")
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name}: expected a non-empty tensor {layout}, got shape {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise ValueError(f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    if k.shape != q.shape:
        raise ValueError(f"k: expected the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: expected shape (B, L, H, Dv) with (B, L, H) = {tuple(q.shape[:3])} as in q, got {tuple(v.shape)}")


def check_decay(name: str, x: Tensor | None, q: Tensor, *, double: bool) -> None:
    """Raise unless ``x`` is None or a log decay that fits q ``(B, L, H, Dk)``; float64 if ``double``, else float32."""
    if x is None:
        return
    check_log_decay(name, x)
    batch, length, heads, width = q.shape
    valid = {1: (heads,), 2: (heads, width), 3: (batch, length, heads), 4: (batch, length, heads, width)}
    if tuple(x.shape) != valid[x.ndim]:
        shapes = ", ".join(map(str, valid.values()))
        raise ValueError(f"{name}: expected one of the shapes {shapes}, got {tuple(x.shape)}")
    expected = torch.float64 if double else torch.float32
    if x.dtype != expected:
        raise ValueError(f"{name}: expected dtype {expected} beside these inputs, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")


def check_order(order: Tensor | None, q: Tensor) -> None:
    """Raise unless ``order`` is None or int64 ``(L,)`` on the device of q; in eager mode on the CPU also where it names a token twice."""
    if order is None:
        return
    length = q.shape[1]
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or tuple(order.shape) != (length,):
        got = f"{order.dtype} {tuple(order.shape)}" if isinstance(order, Tensor) else type(order).__name__
        raise ValueError(f"token_order: expected an int64 tensor (L,) = ({length},), got {got}")
    if order.device != q.device:
        raise ValueError(f"token_order: expected the device of q, {q.device}, got {order.device}")
    # reading values would synchronise a GPU or break a compiled graph
    readable = order.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not torch.equal(order.sort().values, torch.arange(length)):
        raise ValueError(f"token_order: expected each of 0 ... {length - 1} once")


def check_padding(mask: Tensor | None, q: Tensor) -> None:
    """Raise unless ``mask`` is None or bool ``(B, L)`` on the device of q."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"padding_mask: expected a bool tensor (B, L), True = real token, got {got}")
    if tuple(mask.shape) != tuple(q.shape[:2]):
        raise ValueError(f"padding_mask: expected shape (B, L) = {tuple(q.shape[:2])}, got {tuple(mask.shape)}")
    if mask.device != q.device:
        raise ValueError(f"padding_mask: expected the device of q, {q.device}, got {mask.device}")
