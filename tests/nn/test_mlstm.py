"""mLSTM against its equations in float64: unstabilised and dense, and streamed with a running stabiliser in each direction."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lba_exp import ops
from lba_exp.callbacks.parity_measure import layer_shapes, operator_errors
from lba_exp.models.pretrained import create
from lba_exp.nn.decay_groups import weight_decay_groups
from lba_exp.nn.mlstm import MLSTM
from lba_exp.ops import api

FORMS = ("parallel", "recurrent", "chunkwise")
DIRECTIONS = ("both", "forward", "backward")


def build(seed=0, width=8, heads=2, spread=1.0, level=0.0, **options):
    """A float64 layer whose gates and norm are far from where they start; input gates are about ``level``, give or take ``spread``."""
    torch.manual_seed(seed)
    layer = MLSTM(width, heads, chunk_size=3, **options).double()
    for name, parameter in layer.named_parameters():
        if name.startswith(("gate", "norm", "input_gate")):
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        layer.input_gate.projection.weight.mul_(spread)
        layer.input_gate.projection.bias.mul_(spread).add_(level)
    return layer


def parts_of(layer, x):
    """q, k / sqrt(d), v, f and the input gate's logarithm of one sequence, each (heads, L, ...)."""
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).view(len(x), 3, layer.heads, -1).permute(1, 2, 0, 3)
    f = torch.sigmoid(x @ layer.gate.projection.weight.T + layer.gate.projection.bias).T
    log_input = (x @ layer.input_gate.projection.weight.T + layer.input_gate.projection.bias).T
    return q, k / math.sqrt(k.shape[-1]), v, f, log_input


def after(layer, x, y):
    """Norm of each head, output gate and projection; y: (heads, L, d)."""
    centred = y - y.mean(-1, keepdim=True)
    normed = (centred / (centred.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()).transpose(0, 1).flatten(1)
    normed = normed * layer.norm.weight + layer.norm.bias
    return (normed / (1 + (-x @ layer.output_gate.weight.T - layer.output_gate.bias).exp())) @ layer.output.weight.T + layer.output.bias


def definition(layer, x, direction):
    """One sequence of real tokens, x: (L, width), as a matrix of scores and without a stabiliser."""
    q, k, v, f, log_input = parts_of(layer, x)
    scores = (q @ k.mT) * log_input.exp()[:, None]
    for i in range(len(x)):
        for j in range(len(x)):
            seen = direction == "both" or i == j or (j < i) == (direction == "forward")
            scores[:, i, j] *= (f[:, j + 1 : i + 1] if j < i else f[:, i:j]).prod(-1) if seen else 0
    y = scores @ v / torch.maximum(scores.sum(-1).abs(), torch.ones(()))[..., None]
    return after(layer, x, y)


def streamed(layer, x, direction):
    """The same from states carried from token to token: each direction its own running m, joined by exp(m_D - m), the diagonal once."""
    q, k, v, f, log_input = parts_of(layer, x)
    heads, length, width = q.shape
    runs = {}
    for name, order in (("forward", range(length)), ("backward", reversed(range(length)))):
        c, n = q.new_zeros(heads, width, width), q.new_zeros(heads, width)
        m, reads = q.new_full((heads,), -torch.inf), [None] * length
        for t in order:
            newest = torch.maximum(f[:, t].log() + m, log_input[:, t])
            kept, written = (f[:, t].log() + m - newest).exp(), (log_input[:, t] - newest).exp()
            c = kept[:, None, None] * c + written[:, None, None] * k[:, t, :, None] * v[:, t, None]
            n, m = kept[:, None] * n + written[:, None] * k[:, t], newest
            reads[t] = ((q[:, t, None] @ c)[:, 0], (q[:, t] * n).sum(-1), m)
        runs[name] = reads
    y = torch.zeros_like(v)
    for t in range(length):
        read = [runs[name][t] for name in (DIRECTIONS[1:] if direction == "both" else (direction,))]
        m = torch.stack([own for *_, own in read]).max(0).values
        num = sum((own - m).exp()[:, None] * part for part, _, own in read)
        den = sum((own - m).exp() * part for _, part, own in read)
        if direction == "both":
            own = (log_input[:, t] - m).exp() * (q[:, t] * k[:, t]).sum(-1)
            num, den = num - own[:, None] * v[:, t], den - own
        y[:, t] = num / torch.maximum(den.abs(), (-m).exp())[:, None]
    return after(layer, x, y)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(DIRECTIONS),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 9),
    st.sampled_from([(1.0, 0.0), (3.0, 5.0), (5.0, -5.0)]),
    st.integers(0, 2**31),
)
def test_every_form_equals_the_definition_and_the_stream(direction, heads, length, gates, seed):
    layer = build(seed, heads=heads, direction=direction, spread=gates[0], level=gates[1])
    x = torch.randn(2, length, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([definition(layer, row, direction) for row in x])
        torch.testing.assert_close(torch.stack([streamed(layer, row, direction) for row in x]), expected, rtol=1e-7, atol=1e-7)
        for form in FORMS:
            layer.form = form
            torch.testing.assert_close(layer(x), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shift", [-3.0, 4.0, 20.0])
def test_nothing_depends_on_the_stabiliser(monkeypatch, shift):
    """Numerator and denominator alone do, by exp(-m): outputs and gradients do not."""
    layer, x = build(seed=1, spread=3.0), torch.randn(2, 7, 8, dtype=torch.float64)

    def run():
        layer.zero_grad()
        operands = {name: value for name, value in layer.operands(x).items() if name != "scaled"}
        y = layer(x)
        y.square().sum().backward()
        return ops.bidirectional_linear_attention_parts(**operands), (y.detach(), [p.grad.clone() for p in layer.parameters()])

    parts, results = run()
    own = MLSTM.stabiliser
    monkeypatch.setattr(layer, "stabiliser", lambda log_input: own(log_input) + shift)
    other_parts, other_results = run()
    torch.testing.assert_close(other_parts, tuple(part * math.exp(-shift) for part in parts), rtol=1e-9, atol=0)
    torch.testing.assert_close(other_results, results, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("direction", [*DIRECTIONS, "alternating"])
def test_forms_agree_in_gradients_and_padding_equals_cutting_off(direction):
    layer = build(seed=2, direction=direction, layer=1, spread=2.0)
    assert layer.direction == ("backward" if direction == "alternating" else direction)
    assert layer.state_size == (2 if direction == "both" else 1) * 2 * (4 * 4 + 4 + 1)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    padded = torch.cat([500 * torch.randn(2, 2, 8, dtype=torch.float64), x, -500 * x[:, :3]], dim=1)  # their input gates would be largest
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
@pytest.mark.parametrize("gate", ["gate", "input_gate"])
def test_saturated_gates_give_finite_outputs_and_gradients(gate, saturation, form):
    torch.manual_seed(3)
    layer = MLSTM(8, 2, form=form, chunk_size=4)
    with torch.no_grad():
        getattr(layer, gate).projection.bias[0] = saturation
    x, mask = torch.randn(2, 9, 8), torch.arange(9) < torch.tensor([[9], [0]])  # one sequence without a real token
    y = layer(x, mask)
    y[0].square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("level", [-120.0, 50.0, 300.0])
def test_input_gates_of_any_level_are_finite_in_float32(level):
    """A state of nothing but tiny keys reads 0, one of large keys is divided by its own denominator."""
    torch.manual_seed(4)
    layer, x = MLSTM(8, 2), torch.randn(2, 9, 8)
    with torch.no_grad():
        layer.input_gate.projection.bias.fill_(level)
        layer.input_gate.projection.weight.mul_(20)
    y = layer(x)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    double = layer.double()
    torch.testing.assert_close(y.double(), torch.stack([definition(double, row, "both") for row in x.double()]), rtol=1e-3, atol=1e-4)


def test_where_an_input_gate_closes_all_others_the_rest_stays_finite():
    """One key 200 times e larger than all others, which the forget gates keep from them: 0 / 0 in float32, were nothing to bound it."""
    torch.manual_seed(5)
    layer, x = MLSTM(8, 2), torch.randn(1, 6, 8)
    with torch.no_grad():
        layer.gate.projection.bias.fill_(-1e4)
        layer.input_gate.projection.weight.zero_()
        layer.input_gate.projection.weight[:, 0] = 1.0
    x[0, :, 0] = torch.tensor([200.0, 0, 0, 0, 0, 0])
    y = layer(x)
    y.square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_in_the_fused_form_the_layer_computes_the_same():
    """On the kernels' own ground, or in Triton's interpreter."""
    torch.manual_seed(6)
    layer, mask = MLSTM(16, 2), torch.arange(6) < torch.tensor([[6], [4]])
    x = torch.randn(2, 6, 16)
    if torch.cuda.is_available():
        layer, x, mask = layer.cuda(), x.cuda(), mask.cuda()
    results = {}
    for form in ("parallel", "fused"):
        layer.form = form
        layer.zero_grad()
        y = layer(x, mask)
        y[mask].square().sum().backward()
        results[form] = y[mask].detach(), [p.grad.clone() for p in layer.parameters()]
    torch.testing.assert_close(results["fused"], results["parallel"], rtol=1e-3, atol=1e-4)


def test_gates_stay_float32_under_autocast_and_are_spared_weight_decay():
    torch.manual_seed(7)
    layer, x = MLSTM(16, 2, chunk_size=4), torch.randn(2, 12, 16)
    exact, log_input = layer(x), layer.input_gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.input_gate(x), log_input) and log_input.dtype == torch.float32
        operands = layer.operands(x)
        assert {operands[name].dtype for name in "qkv"} == {torch.bfloat16}
        assert operands["forward_log_decay"].dtype == operands["backward_log_decay"].dtype == torch.float32
        for form in FORMS:
            layer.form = form
            y = layer(x)
            assert y.dtype == torch.bfloat16 and (y - exact).norm() / exact.norm() < 5e-2
    decayed = {id(p) for p in weight_decay_groups(layer, 0.1)[0]["params"]}
    assert not any(id(p) in decayed for gate in (layer.gate, layer.input_gate) for p in gate.parameters())


@torch.no_grad()
def test_parity_judges_numerator_and_denominator_apart(monkeypatch):
    config = {"kind": "sequence_classifier", "channels": 1, "classes": 3, "length": 8, "width": 8, "depth": 1, "heads": 2}
    torch.manual_seed(8)
    model = create(config | {"mixer": {"kind": "mlstm", "chunk_size": 3}}).eval()
    batch = {"inputs": torch.randn(2, 8, 1)}
    shapes = layer_shapes(model, batch)
    assert shapes == [(8, 2, 4, 4)]
    errors, _ = operator_errors(model, batch, FORMS, shapes, 1.0)
    assert max(errors.values()) < 2e-6
    right = api._IMPLEMENTATIONS["chunkwise"]

    def wrong(*args, **options):
        num, den = right(*args, **options)
        return num, 1.001 * den

    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunkwise", wrong)
    errors, _ = operator_errors(model, batch, FORMS, shapes, 1.0)
    assert errors["chunkwise"] == pytest.approx(1e-3, rel=0.01) and errors["recurrent"] < 2e-6


def test_bad_arguments_are_named():
    for options, message in (
        ({"heads": 3}, "heads: expected a divisor of the width 8, got 3"),
        ({"gate_init": "hippo"}, "gate_init: got 'hippo', valid are 'timescales', 'random', 'retnet'"),
        ({"chunk_size": 0}, "chunk_size: .* got 0"),
        ({"direction": "left"}, "direction: got 'left'"),
    ):
        with pytest.raises(ValueError, match=message):
            MLSTM(8, **{"heads": 2, **options})
