"""The selective scan of state spaces, S6: linear attention with a head for each channel, values of one number and a decay per state."""

import torch
from torch import Tensor

from lba_exp.ops.api import bidirectional_linear_attention
from lba_exp.ops.checks import FLOATS, check_padding, choice
from lba_exp.ops.fused_scan import fused_scan, selective_scan_obstacle
from lba_exp.ops.precision import compute_dtype, no_autocast

SCAN_FORMS = ("parallel", "recurrent", "chunkwise", "fused", "auto")


def _check_tensor(name: str, tensor: object, layout: str, sizes: tuple[int | None, ...], device: torch.device, *, wide: bool) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor {layout}, got {type(tensor).__name__}")
    shape = tuple(tensor.shape)
    if len(shape) != len(sizes) or 0 in shape or any(known not in (None, size) for known, size in zip(sizes, shape, strict=True)):
        wanted = f" = {sizes}" if None not in sizes else ""
        raise ValueError(f"{name}: expected a non-empty tensor {layout}{wanted}, got shape {shape}")
    valid = FLOATS[:2] if wide else FLOATS
    if tensor.dtype not in valid:
        raise ValueError(f"{name}: expected {' or '.join(map(str, valid))}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected the device of x, {device}, got {tensor.device}")


def _check(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, direction: str, padding_mask: Tensor | None, form: str, chunk_size: int
) -> None:
    """Raise ValueError, naming the argument, unless all of a call fit together."""
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    _check_tensor("x", x, "(B, L, D)", (None, None, None), device, wide=False)
    batch, length, channels = x.shape
    _check_tensor("delta", delta, "(B, L, D)", (batch, length, channels), device, wide=True)
    _check_tensor("a", a, f"(D, N) with D = {channels}", (channels, None), device, wide=True)
    for name, tensor in (("b", b), ("c", c)):
        _check_tensor(name, tensor, "(B, L, N)", (batch, length, a.shape[1]), device, wide=False)
    check_padding(padding_mask, x)
    choice("direction", direction, ("forward", "backward"))
    choice("form", form, SCAN_FORMS)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: expected an integer >= 1, got {chunk_size!r}")
    if device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading values would synchronise a GPU or break a compiled graph
    for name, tensor, wrong, wanted in (("delta", delta, delta < 0, "step sizes >= 0"), ("a", a, a > 0, "rates <= 0")):
        if bool(wrong.any()):
            raise ValueError(f"{name}: expected {wanted}, got {tensor.detach()[wrong][0].item():g}")


def _fastest(device: torch.device, dtype: torch.dtype, state: int) -> str:
    if device.type == "cuda":
        return "fused" if selective_scan_obstacle(device, dtype, state) is None else "chunkwise"
    return "recurrent" if device.type == "cpu" and not torch.compiler.is_compiling() else "chunkwise"


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
    delta: ``(B, L, D)``, step sizes >= 0, and a: ``(D, N)``, rates <= 0; float32, float64 beside float64 inputs.
    b, c: ``(B, L, N)``, what is written into the state and what is read of it, the same for all channels; dtypes as of x.
    direction: "forward" (h_{i-1} comes from the left) or "backward".
    padding_mask: bool ``(B, L)``, True = real token. Padded tokens write nothing, and their output is 0; their decays still count, so
        padding at either end equals cutting it off.
    form: "parallel", "recurrent" and "chunkwise" are those of ``bidirectional_linear_attention`` with D heads, keys b of N features, values
        delta x of one, and a decay per key channel; "fused" is a kernel for GPUs that never writes the states of all tokens to memory:
        float32 and half precision, N a power of two up to 64; "auto": on CUDA "fused" where it can run, else "chunkwise"; on a CPU
        "recurrent", or "chunkwise" in a graph that is compiled, where a loop over tokens would be unrolled. All give the same results,
        computed in float32, in float64 where one of the inputs is. "parallel" alone has derivatives beyond the first.
    chunk_size: tokens a chunk in the chunkwise form; not a part of the result.

    Times on one CPU core, D = 96, N = 16, float32, forward / with backward, ms::

        B, L     parallel     recurrent     chunkwise: 8   16            32            64
        1, 100   35 / 83      4 / 24        13 / 54        18 / 66       21 / 66       27 / 82
        1, 200   91 / 175     7 / 40        25 / 92        24 / 92       27 / 100      38 / 142
        8, 200                36 / 166      158 / 723      190 / 813     228 / 889     277 / 1,123
        1, 1000               29 / 161      117 / 528      111 / 455     127 / 615     158 / 706

    Values of one number leave products of matrices nothing to gain on a CPU; on a GPU "recurrent" would launch kernels for every token. It
    and "chunkwise" are given the decays of all tokens, L D N numbers a sequence.

    Returns ``(B, L, D)`` in the dtype of x, without the skip D x of the published layer. Raises ValueError, naming the argument, for
    shapes, dtypes, devices and names that do not fit, and in eager mode on CPU for steps below 0 and rates above.
    """
    _check(x, delta, a, b, c, direction, padding_mask, form, chunk_size)
    dtype, channels = x.dtype, x.shape[2]
    wide = compute_dtype(x, delta, a, b, c)
    if form == "auto":
        form = _fastest(x.device, wide, a.shape[1])
    with no_autocast(x.device):
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
