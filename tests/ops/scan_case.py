"""The selective scan by its definition, token by token, random operands for it, and kernels that write to NaN."""

from contextlib import contextmanager

import torch


def definition(x, delta, a, b, c, *, direction="forward", padding_mask=None):
    """h_i = exp(delta_i a) h_{i-1} + delta_i b_i x_i, y_i = c_i . h_i."""
    batch, length, channels = x.shape
    real = torch.ones(batch, length, device=x.device) if padding_mask is None else padding_mask
    h, rows = x.new_zeros(batch, channels, a.shape[1]), [None] * length
    for t in range(length) if direction == "forward" else reversed(range(length)):
        written = delta[:, t] * x[:, t] * real[:, t, None]
        h = torch.exp(delta[:, t, :, None] * a) * h + written[..., None] * b[:, t, None]
        rows[t] = (h * c[:, t, None]).sum(-1) * real[:, t, None]
    return torch.stack(rows, dim=1)


def operands(batch, length, channels, state, *, largest=2.0, seed=0, device="cpu"):
    """x, delta, a, b, c in float64; step sizes up to ``largest``."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    drawn = normal(batch, length, channels), largest * uniform(batch, length, channels), -4 * uniform(channels, state)
    drawn += normal(batch, length, state), normal(batch, length, state)
    return [tensor.to(device) for tensor in drawn]


def mask_of(kind, batch, length, device="cpu"):
    """A padding mask, or None; the same tokens in all sequences."""
    if kind == "none":
        return None
    places = torch.arange(length, device=device).expand(batch, length)
    return {"left": places >= length // 3, "right": places < length - length // 3, "holes": places % 3 != 1}[kind]


@contextmanager
def poisoned():
    """What the kernels write to is NaN before they run."""
    from lba_exp.ops.fused_scan import launch

    from .poison import _Torch

    launch.torch = _Torch()
    try:
        yield
    finally:
        launch.torch = torch


def error(found, expected):
    """Relative L2 error; of nothing but zeros, the norm."""
    found, expected = (0 if x is None else x.detach().double() for x in (found, expected))
    return float((found - expected).norm() / max(expected.norm(), 1e-30)) if torch.is_tensor(found) else float(expected.norm())


def errors(form_of, inputs, dtypes, **options):
    """Errors of the output and of each input's gradient of ``form_of(*inputs)``, inputs in ``dtypes``, against the definition."""
    exact = [x.to(dtype).double().requires_grad_() for x, dtype in zip(inputs, dtypes, strict=True)]
    given = [x.to(dtype).requires_grad_() for x, dtype in zip(inputs, dtypes, strict=True)]
    expected, found = definition(*exact, **options), form_of(*given, **options)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(expected.device).to(found.dtype)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    got = torch.autograd.grad(found, given, grad, allow_unused=True)  # of one token, the rates decide nothing
    return [error(found, expected), *(error(g, w) for g, w in zip(got, wanted, strict=True))]
