"""HGRN-2 against its definition: masks of products of gates, written out in float64."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lba_exp.build import mixer as build_mixer
from lba_exp.composing import compose
from lba_exp.errors import ConfigError
from lba_exp.nn.hgrn2 import HGRN2
from lba_exp.ops import bidirectional_linear_attention

FORMS = ("parallel", "recurrent", "chunkwise")
DIRECTIONS = ("both", "forward", "backward")


def build(seed=0, width=8, heads=2, **options):
    """A float64 layer whose gates and norm are far from where they start."""
    torch.manual_seed(seed)
    layer = HGRN2(width, heads, chunk_size=3, **options).double()
    for name, parameter in layer.named_parameters():
        if name.startswith(("gate", "norm")):
            torch.nn.init.normal_(parameter)
    return layer


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def definition(layer, x, direction):
    """One sequence of real tokens, x: (L, width)."""
    length, width = x.shape
    split = (length, layer.heads, width // layer.heads)
    q, v = (x @ layer.qv.weight.T + layer.qv.bias).chunk(2, -1)
    q, v = sigmoid(q).view(split), (v * sigmoid(v)).view(split)
    gates = sigmoid(x @ layer.gate.projection.weight.T + layer.gate.projection.bias).view(split)
    y = torch.zeros_like(v)
    for i in range(length):
        for j in range(length):
            if (direction == "forward" and j > i) or (direction == "backward" and j < i):
                continue
            between = gates[j + 1 : i + 1] if j < i else gates[i:j]
            weight = q[i] * between.prod(0) * (1 - gates[j])  # an empty product is 1: the diagonal, once
            y[i] += weight.sum(-1, keepdim=True) * v[j]
    y = y.flatten(1)
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt() * layer.norm.weight + layer.norm.bias
    return normed @ layer.output.weight.T + layer.output.bias


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(DIRECTIONS), st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(0, 2**31))
def test_every_form_equals_the_definition(direction, heads, length, seed):
    layer = build(seed, heads=heads, direction=direction)
    x = torch.randn(2, length, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([definition(layer, row, direction) for row in x])
        for form in FORMS:
            layer.form = form
            torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_forward_is_flash_linear_attentions_gla_with_keys_of_one_minus_the_gate():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no GPU
        from fla.ops.gla.naive import naive_recurrent_gla
    layer, x = build(direction="forward").float(), torch.randn(2, 9, 8)
    operands, log_gate = layer.operands(x), layer.gate(x)
    read, _ = naive_recurrent_gla(2 * operands["q"], 1 - log_gate.exp(), operands["v"], log_gate)  # scales q by 1 / sqrt(4)
    torch.testing.assert_close(bidirectional_linear_attention(**operands), read, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", [*DIRECTIONS, "alternating"])
def test_forms_agree_in_gradients_and_padding_equals_cutting_off(direction):
    layer = build(direction=direction, layer=1)
    assert layer.direction == ("backward" if direction == "alternating" else direction)
    assert layer.state_size == (2 if direction == "both" else 1) * 2 * 4 * 4
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    padded = torch.cat([50 * torch.randn(2, 2, 8, dtype=torch.float64), x, -50 * x[:, :3]], dim=1)
    real = F.pad(torch.ones(2, 7, dtype=torch.bool), (2, 3))
    results = {}
    for form in FORMS:
        layer.form = form
        for inputs, mask in ((x, None), (padded, real)):
            layer.zero_grad()
            y = layer(inputs, mask)
            y = y if mask is None else y[mask].view_as(x)
            y.square().sum().backward()
            results[form, mask is None] = y.detach(), [p.grad.clone() for p in layer.parameters()]
    for result in results.values():
        torch.testing.assert_close(result, results["parallel", True], rtol=1e-9, atol=1e-9)
    assert all((p.grad != 0).any() for p in layer.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("saturation", [1e4, -1e4])
def test_saturated_gates_give_finite_outputs_and_gradients(saturation, form):
    torch.manual_seed(1)
    layer = HGRN2(8, 2, form=form, chunk_size=4)
    with torch.no_grad():
        layer.gate.projection.bias[:3] = saturation
    y = layer(torch.randn(2, 9, 8))
    y.square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() and (p.grad != 0).any() for p in layer.parameters())


def test_keys_of_long_memories_keep_their_digits_and_decays_their_dtype():
    torch.manual_seed(2)
    layer, x = HGRN2(16, 2), torch.randn(2, 6, 16)
    with torch.no_grad():
        layer.gate.projection.bias.fill_(18.0)  # 1 - lambda is 1.5e-8: nothing is left of it in float32
    exact = sigmoid(-(x.double() @ layer.gate.projection.weight.double().T + layer.gate.projection.bias.double()))
    torch.testing.assert_close(layer.operands(x)["k"].flatten(2).double(), exact, rtol=1e-5, atol=0)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        operands = layer.operands(x)
        assert {operands[name].dtype for name in "qkv"} == {torch.bfloat16}
        assert operands["forward_log_decay"].dtype == operands["backward_log_decay"].dtype == torch.float32
        for form in FORMS:
            layer.form = form
            assert (layer(x) - exact).norm() / exact.norm() < 5e-2


def test_what_it_does_not_take_is_refused():
    with pytest.raises(ValueError, match="gate_init: got 'hippo', valid are 'timescales', 'random'"):
        HGRN2(8, 2, gate_init="hippo")
    with pytest.raises(ValueError, match="heads: expected a divisor of the width 8, got 3"):
        HGRN2(8, 3)
    with pytest.raises(ValueError, match="form: got 'fused', valid are 'parallel', 'recurrent', 'chunkwise', 'auto'"):
        HGRN2(8, 2, form="fused")
    with pytest.raises(ConfigError, match=r"model\.mixer\.gate=fixed means nothing to HGRN2"):
        build_mixer(compose(["model=hgrn2", "model.mixer.gate=fixed"]).model, 0)
    assert HGRN2(8, 2, gate_init="random").gate.projection.bias.abs().max() < 1
