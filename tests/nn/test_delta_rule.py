"""DeltaNet's layer against its equations in a Python loop in float64: projections, lengths, both recurrences, norm, gate."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from lba_exp import ops
from lba_exp.nn.decay_groups import weight_decay_groups
from lba_exp.nn.delta_rule import DeltaRule

FORMS = ("parallel", "recurrent", "chunkwise")
DIRECTIONS = ("both", "forward", "backward")


def make(width=8, heads=2, dtype=torch.float64, **options):
    """A layer with strong gates, so that every part of it shows."""
    torch.manual_seed(0)
    layer = DeltaRule(width, heads, chunk_size=3, **options).to(dtype)
    if layer.gate is not None:
        torch.nn.init.normal_(layer.gate.bias)
        torch.nn.init.normal_(layer.gate.log_rate, std=0.5)
    torch.nn.init.normal_(layer.beta.weight)
    torch.nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
    return layer


def definition(layer, x):
    """One sequence, x: (L, width)."""
    length, width = x.shape
    size = width // layer.heads
    qkv = x @ layer.qkv.weight.T
    if layer.convolution is not None:
        qkv = layer.convolution(qkv[None])[0]
    qkv = qkv / (1 + torch.exp(-qkv))
    beta = 1 / (1 + torch.exp(-x @ layer.beta.weight.T))
    alpha = torch.ones_like(beta)
    if layer.gate is not None:
        steps = torch.log(1 + torch.exp(x @ layer.gate.projection.weight.T + layer.gate.bias))
        alpha = torch.exp(-torch.exp(layer.gate.log_rate) * steps)
    heads = []
    for h in range(layer.heads):
        q, k, v = (qkv[:, n * width + h * size : n * width + (h + 1) * size] for n in range(3))
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        q = q / size**0.5
        total = torch.zeros_like(v)
        for direction in ("forward", "backward") if layer.direction == "both" else (layer.direction,):
            state, rows = torch.zeros(size, size, dtype=x.dtype), [None] * length
            for i in range(length) if direction == "forward" else reversed(range(length)):
                erased = state - beta[i, h] * torch.outer(k[i], k[i] @ state)
                state = alpha[i, h] * erased + beta[i, h] * torch.outer(k[i], v[i])
                rows[i] = q[i] @ state
            total = total + torch.stack(rows)
        if layer.direction == "both":
            total = total - beta[:, h : h + 1] * (q * k).sum(-1, keepdim=True) * v
        heads.append(total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight)
    y = torch.cat(heads, dim=-1)
    if layer.output_gate is not None:
        z = x @ layer.output_gate.weight.T
        y = y * z / (1 + torch.exp(-z))
    return y @ layer.output.weight.T


@pytest.mark.parametrize(("direction", "gated"), list(itertools.product(DIRECTIONS, [False, True])))
@pytest.mark.parametrize("convolution", [0, 3])
def test_every_form_is_the_definition(direction, gated, convolution):
    layer = make(direction=direction, gated=gated, convolution=convolution)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    expected = torch.stack([definition(layer, row) for row in x])
    for form in layer.forms:
        layer.form = form
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gated", [False, True])
def test_forms_have_the_same_gradients_and_every_parameter_one(gated):
    layer, found = make(gated=gated), []
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    for form in FORMS:
        layer.form = form
        found.append(torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]))
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, *each in zip(names, *found, strict=True):
        assert each[0].isfinite().all() and each[0].any(), name
        for other in each[1:]:
            torch.testing.assert_close(other, each[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("direction", "gated"), list(itertools.product(DIRECTIONS, [False, True])))
@pytest.mark.parametrize("form", FORMS)
def test_padding_at_either_end_equals_cutting_it_off(direction, gated, form):
    layer = make(direction=direction, gated=gated, form=form)
    x, junk = torch.randn(2, 5, 8, dtype=torch.float64), 100 * torch.randn(2, 3, 8, dtype=torch.float64)
    expected, real, padded = layer(x), torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    torch.testing.assert_close(layer(torch.cat([x, junk], 1), torch.cat([real, padded], 1))[:, :5], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(torch.cat([junk, x], 1), torch.cat([padded, real], 1))[:, 3:], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [1, 3, 4])
def test_one_direction_reads_one_side_with_its_convolution_too(width):
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    other = x.clone()
    other[:, 4] += 1
    for direction, same in (("forward", slice(0, 4)), ("backward", slice(5, 9))):
        layer = make(direction=direction, gated=True, convolution=width)
        changed = (layer(x) - layer(other)).abs().amax(dim=(0, 2)) > 1e-9
        assert not changed[same].any() and changed.sum() == 5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_saturated_gates_have_finite_gradients(form, bias):
    layer = make(gated=True, form=form, dtype=torch.float32)
    with torch.no_grad():
        layer.gate.bias[0] = bias
        layer.beta.weight[0] *= 1e4
    y = layer(torch.randn(2, 7, 8))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_under_autocast_beta_and_decays_stay_in_float32():
    layer = make(width=32, gated=True, dtype=torch.float32)
    x = torch.randn(2, 20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        operands, y = layer.operands(x), layer(x)
    assert [operands[name].dtype for name in "qkv"] == [torch.bfloat16] * 3
    exact = layer.operands(x)
    for name in ("beta", "forward_log_decay", "backward_log_decay"):
        assert torch.equal(operands[name], exact[name])
    assert (y - layer(x)).norm() < 0.05 * layer(x).norm()


def test_queries_and_keys_have_their_lengths_and_padded_tokens_none():
    layer = make(gated=True)
    mask = torch.tensor([[True] * 5 + [False] * 4])
    operands = layer.operands(torch.randn(1, 9, 8, dtype=torch.float64), mask)
    torch.testing.assert_close(operands["k"][:, :5].norm(dim=-1), torch.ones(1, 5, 2, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(operands["q"][:, :5].norm(dim=-1), torch.full((1, 5, 2), 0.5, dtype=torch.float64), rtol=1e-3, atol=0)
    x = torch.zeros(1, 3, 8, dtype=torch.float64, requires_grad=True)  # no length to divide by
    layer(x).sum().backward()
    assert x.grad.isfinite().all()


def test_the_gate_starts_as_mamba_2s():
    torch.manual_seed(0)
    gate = DeltaRule(64, 64, gated=True).gate
    steps, rates = F.softplus(gate.bias), gate.log_rate.exp()
    assert 0.999e-3 <= steps.min() < 2e-3 and 5e-2 < steps.max() <= 1.001e-1
    assert 1 <= rates.min() < 2 and 14 < rates.max() <= 16


def test_sizes_directions_and_what_weight_decay_leaves_alone():
    layer = DeltaRule(12, 3, gated=True, direction="alternating", layer=1)
    assert (layer.direction, layer.state_size, layer.key_width, layer.value_width) == ("backward", 3 * 4 * 4, 4, 4)
    assert DeltaRule(12, 3).state_size == 2 * 3 * 4 * 4
    parameters = sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("convolution"))
    assert parameters == 5 * 12**2 + 3 * 12 + (12 + 2) * 3 + 4  # q, k, v, gate, output; beta; decay; norm
    decayed = {id(p) for p in weight_decay_groups(layer, 0.1)[0]["params"]}
    exempt = {name for name, p in layer.named_parameters() if id(p) not in decayed and not name.startswith("convolution")}
    assert exempt == {"gate.projection.weight", "gate.bias", "gate.log_rate", "norm.weight"}
    assert layer.operator is ops.bidirectional_delta_rule and layer.forms == FORMS


MISTAKES = {
    "heads: expected a divisor of the width 8, got 3": {"heads": 3},
    "direction: got 'sideways'": {"direction": "sideways"},
    "chunk_size: expected an integer >= 1": {"chunk_size": 0},
    "gated: expected True or False, got 'yes'": {"gated": "yes"},
    "convolution: expected an integer >= 0, got -1": {"convolution": -1},
    "form: got 'fused'": {"form": "fused"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises(ValueError, match=message):
        DeltaRule(**{"width": 8, "heads": 2} | MISTAKES[message])


def test_a_centred_convolution_needs_an_odd_width():
    with pytest.raises(ValueError):
        DeltaRule(8, 2, convolution=4)
