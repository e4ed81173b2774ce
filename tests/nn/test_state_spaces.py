"""Mamba-2, Hydra and Vision Mamba against dense matrices from their definitions, in float64."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from lba_exp.nn.hydra import Hydra
from lba_exp.nn.mamba2 import Mamba2
from lba_exp.nn.vim import Vim
from lba_exp.ops.fused.operator import INTERPRETED

WIDTH, HEADS, LENGTH = 8, 2, 11
KINDS = {
    "mamba2": lambda **options: Mamba2(WIDTH, HEADS, state=3, convolution=3, chunk_size=4, **options),
    "hydra": lambda **options: Hydra(WIDTH, HEADS, state=3, convolution=3, chunk_size=4, **options),
    "vim": lambda **options: Vim(WIDTH, HEADS, state=3, convolution=3, chunk_size=4, **options),
}
DIRECTIONS = ("both", "forward", "backward")
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, **options):
    torch.manual_seed(0)
    layer = KINDS[kind](**options).double()
    with torch.no_grad():  # nothing that is alike for all heads or channels
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer, torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)


def semiseparable(log_decay, reverse, strict=False):
    """(L, L): the product of the decays after token j up to token i, 0 where i is read before j (or, ``strict``, is j)."""
    length = len(log_decay)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(length):
            if i == j:
                matrix[i, j] = 0 if strict else 1
            elif (j > i) == reverse:
                between = log_decay[i:j] if reverse else log_decay[j + 1 : i + 1]
                matrix[i, j] = between.sum().exp()
    return matrix


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def mamba2(layer, u):
    """Row by row: sum over j of (C_i . B_j) M_ij Delta_j x_j, the diagonal once, plus D x_i."""
    inner, state, heads = WIDTH * 2, 3, HEADS
    z, mixed = layer.input(u).split([inner, inner + 2 * state], -1)
    x, b, c = F.silu(layer.convolution(mixed)).split([inner, state, state], -1)
    delta = F.softplus(u @ layer.gate.projection.weight.T + layer.gate.bias)
    y = torch.zeros_like(x)
    for n in range(len(u)):
        for h in range(heads):
            own = slice(h * inner // heads, (h + 1) * inner // heads)
            log_decay = -delta[n, :, h] * layer.gate.log_rate[h].exp()
            matrix = sum(semiseparable(log_decay, reverse) for reverse in reversed_of(layer))
            matrix = matrix.fill_diagonal_(1)
            y[n, :, own] = (c[n] @ b[n].T * matrix) @ (delta[n, :, h, None] * x[n, :, own]) + layer.skip[h] * x[n, :, own]
    return layer.output(rms(y * F.silu(z), layer.norm))


def hydra(layer, u):
    """The quasiseparable matrix: below the diagonal C_{i-1} M_{i-1,j} B_j, above it C_{i+1} M_{i+1,j} B_j, on it W_D x_i + D."""
    inner, state, heads = WIDTH * 2, 3, HEADS
    directions = reversed_of(layer)
    z, mixed = layer.input(u).split([inner, inner + 2 * state * len(directions)], -1)
    x, *bc = F.silu(layer.convolution(mixed)).split([inner, *[state] * 2 * len(directions)], -1)
    raw = (u @ layer.gate.projection.weight.T).unflatten(-1, (len(directions), heads))
    y = torch.zeros_like(x)
    for n in range(len(u)):
        for h in range(heads):
            own = slice(h * inner // heads, (h + 1) * inner // heads)
            y[n, :, own] = (x[n] @ layer.diagonal.weight[h] + layer.skip[h])[:, None] * x[n, :, own]
            for d, reverse in enumerate(directions):
                delta = F.softplus(raw[n, :, d, h] + layer.gate.bias[h])
                matrix = semiseparable(-delta * layer.gate.log_rate[h].exp(), reverse)
                out = (bc[2 * d + 1][n] @ bc[2 * d][n].T * matrix) @ (delta[:, None] * x[n, :, own])
                moved = out[1:] if reverse else out[:-1]
                y[n, slice(0, -1) if reverse else slice(1, None), own] += moved
    return layer.output(rms(y, layer.norm) * F.silu(z))


def vim(layer, u):
    """Each channel a matrix of its own, sum over the states of C_i M_ij B_j; both directions with their diagonals, and D x in each."""
    inner = WIDTH * 2
    inside, z = layer.input(u).chunk(2, -1)
    y = torch.zeros_like(inside)
    for scan, reverse in zip(layer.scans, reversed_of(layer), strict=True):
        x = F.silu(scan.convolution(inside))
        steps, b, c = scan.input(x).split([1, 3, 3], -1)
        delta = F.softplus(scan.steps(steps))
        for n in range(len(u)):
            for d in range(inner):
                for s in range(3):
                    matrix = semiseparable(-delta[n, :, d] * scan.rates.log_rate[d, s].exp(), reverse)
                    y[n, :, d] += (c[n, :, s, None] * matrix * b[n, :, s]) @ (delta[n, :, d] * x[n, :, d])
        y = y + scan.skip * x
    return layer.output(y * F.silu(z))


def reversed_of(layer):
    return {"both": (False, True), "forward": (False,), "backward": (True,)}[layer.direction]


DENSE = {"mamba2": mamba2, "hydra": hydra, "vim": vim}


@pytest.mark.parametrize("direction", DIRECTIONS)
@every_kind
def test_every_form_is_the_dense_matrix(kind, direction):
    layer, u = make(kind, direction=direction)
    assert layer.direction == direction
    expected = DENSE[kind](layer, u)
    for form in ("parallel", "recurrent", "chunkwise", "auto"):
        layer.form = form
        torch.testing.assert_close(layer(u), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
@every_kind
def test_padding_at_either_end_is_cutting_it_off(kind, direction):
    layer, u = make(kind, direction=direction)
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[:, 2:8] = True
    whole = torch.where(mask[..., None], u, 1e3)
    torch.testing.assert_close(layer(whole, mask)[:, 2:8], layer(u[:, 2:8]), rtol=1e-9, atol=1e-9)


@every_kind
def test_every_parameter_gets_a_gradient_however_far_the_steps_saturate(kind):
    layer, u = make(kind)
    biases = [layer.gate.bias] if kind != "vim" else [scan.steps.bias for scan in layer.scans]
    for shift in (0.0, 1e4, -1e4):
        with torch.no_grad():
            for bias in biases:
                bias.add_(shift)
        layer.zero_grad()
        layer(u).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad.isfinite().all(), (name, shift)
            assert shift or (parameter.grad != 0).any(), name
        with torch.no_grad():
            for bias in biases:
                bias.sub_(shift)


@every_kind
def test_forms_of_the_state_and_of_half_precision(kind):
    layer, u = make(kind)
    assert layer.forms == ("parallel", "recurrent", "chunkwise")
    inner = 2 * WIDTH
    assert layer.state_size == 2 * inner * 3 == 2 * KINDS[kind](direction="forward").state_size
    layer, u = layer.float(), u.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(u)
    assert half.dtype == torch.bfloat16 and (half - layer(u)).norm() < 0.03 * layer(u).norm()


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton, and its interpreter")
@every_kind
def test_the_fused_form_takes_keys_that_heads_share(kind):
    torch.manual_seed(0)
    layer = type(make(kind)[0])(WIDTH, HEADS, state=4).eval()
    u = torch.randn(1, 5, WIDTH)
    expected = layer(u)
    layer.form = "fused"
    torch.testing.assert_close(layer(u), expected, rtol=1e-4, atol=1e-5)


def test_mamba2_forward_is_flash_linear_attentions():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no GPU
        from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
    layer, u = make("mamba2", direction="forward")
    calls = layer.operands(u)
    g = torch.zeros_like(calls["forward_log_decay"])
    g[:, 1:] = calls["forward_log_decay"][:, 1:]
    found = naive_recurrent_simple_gla(*(calls[name].float() for name in ("q", "k", "v")), g.float(), scale=1.0)
    found = found[0] if isinstance(found, tuple) else found
    own = layer.operator(**calls, form="chunkwise")
    torch.testing.assert_close(found.double(), own, rtol=1e-4, atol=1e-5)


def test_vision_mamba_counts_a_token_in_both_directions_and_has_kernels_of_its_own():
    layer, _ = make("vim")
    assert "takes float32" in layer.fused_obstacle(torch.device("cuda"), torch.float64)
    assert layer.fused_obstacle(torch.device("meta"), torch.float32) is not None  # states of 3 numbers
    assert Vim(WIDTH, HEADS).fused_obstacle(torch.device("meta"), torch.float32) is None
    layer.form = "fused"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mamba2(9, 4), "heads: expected a divisor of expand"),
        (lambda: Hydra(8, 2, convolution=4), "convolution: expected an odd number"),
        (lambda: Mamba2(8, 2, state=0), "state: "),
        (lambda: Vim(8, 3), "heads: "),
        (lambda: Vim(8, 2, form="blockwise"), "form: "),
        (lambda: Hydra(8, 2, direction="up"), "direction"),
    ],
)
def test_mistakes_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
