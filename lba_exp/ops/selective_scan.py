"""The selective scan of state spaces, S6: linear attention with a head for each channel, values of one number and a decay per state."""

import torch
from torch import Tensor

from lba_exp.ops.api import bidirectional_linear_attention
from lba_exp.ops.checks import FLOATS, choice
from lba_exp.ops.fused_scan import fused_scan, selective_scan_obstacle
from lba_exp.ops.precision import no_autocast

SCAN_FORMS = ("parallel", "recurrent", "chunkwise", "fused", "auto")


def _check(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, direction: str, padding_mask: Tensor | None, form: str) -> None:
    if not isinstance(x, Tensor) or x.ndim != 3 or x.dtype not in FLOATS:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected a floating (B, L, D), got {got}")
    batch, length, channels = x.shape
    if a.ndim != 2 or a.shape[0] != channels:
        raise ValueError(f"a: expected (D, N) with D = {channels}, got {tuple(a.shape)}")
    state = a.shape[1]
    for name, tensor, shape in (("delta", delta, tuple(x.shape)), ("b", b, (batch, length, state)), ("c", c, (batch, length, state))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
    for name, tensor in (("delta", delta), ("a", a), ("b", b), ("c", c)):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
    if padding_mask is not None and (padding_mask.dtype != torch.bool or tuple(padding_mask.shape) != (batch, length)):
        given = f"{padding_mask.dtype} of shape {tuple(padding_mask.shape)}"
        raise ValueError(f"padding_mask: expected torch.bool of shape ({batch}, {length}), True = real token, got {given}")
    choice("direction", direction, ("forward", "backward"))
    choice("form", form, SCAN_FORMS)


def selective_scan(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    direction: str = "forward",
    padding_mask: Tensor | None = None,
    form: str = "auto",
    chunk_size: int = 16,
) -> Tensor:
    """One selective scan (Mamba, arXiv 2312.00752, equation 2 and algorithm 2), from the first token on or from the last::

        h_i = exp(delta_i a) h_{i-1} + delta_i b_i x_i,    y_i = c_i . h_i        for each channel, h of N numbers

    x: ``(B, L, D)``, float64, float32, bfloat16 or float16.
    delta: ``(B, L, D)``, step sizes >= 0, and a: ``(D, N)``, rates < 0; float32, float64 beside float64 inputs.
    b, c: ``(B, L, N)``, what is written into the state and what is read of it, the same for all channels.
    direction: "forward" (h_{i-1} comes from the left) or "backward".
    padding_mask: bool ``(B, L)``, True = real token. Padded tokens write nothing, and their output is 0; their decays still count, so
        padding at either end equals cutting it off.
    form: "parallel", "recurrent" and "chunkwise" are those of ``bidirectional_linear_attention`` with D heads, keys b of N features, values
        delta x of one, and a decay per key channel; "fused" is a kernel for GPUs that never writes the states of all tokens to memory:
        float32 and half precision, N a power of two up to 64; "auto": "fused" where it can run, else what the operator chooses. All give
        the same results. "fused" has first derivatives only.
    chunk_size: tokens a chunk in the chunkwise form; not a part of the result.

    Returns ``(B, L, D)`` in the dtype of x, without the skip D x of the published layer. Raises ValueError, naming the argument, for
    shapes, dtypes, devices and names that do not fit.
    """
    _check(x, delta, a, b, c, direction, padding_mask, form)
    if form == "auto" and x.device.type == "cuda" and selective_scan_obstacle(x.device, x.dtype, a.shape[1]) is None:
        form = "fused"
    dtype, channels = x.dtype, x.shape[2]
    with no_autocast(x.device):
        wide = torch.float64 if torch.float64 in (x.dtype, delta.dtype, a.dtype) else torch.float32
        delta, a = delta.to(wide), a.to(wide)
        if form == "fused":
            return fused_scan(x, delta, a, b, c, padding_mask, direction == "backward")
        q, k = (y.to(wide)[:, :, None].expand(-1, -1, channels, -1) for y in (c, b))
        y = bidirectional_linear_attention(
            q,
            k,
            (delta * x)[..., None],
            **{f"{direction}_log_decay": delta[..., None] * a},
            scaled=False,
            direction=direction,
            padding_mask=padding_mask,
            form=form,
            chunk_size=chunk_size,
        )
    return y[..., 0].to(dtype)
