"""The linear attention layer against the definition in float64, computed here by itself: scores, decay products, division, projection."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from lba_exp import ops
from lba_exp.nn.attention import LinearAttention

GATES = ("none", "fixed", "selective")
CONVENTIONS = ("key", "query", "symmetric")
FORMS = ("parallel", "recurrent", "chunkwise")
VARIANTS = list(itertools.product(GATES, CONVENTIONS, ("after", "none")))


def random_layer(width=8, heads=2, **options):
    """A float64 layer whose gates are far from constant."""
    layer = LinearAttention(width, heads, chunk_size=3, **options).double()
    for parameter in layer.gate.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def decay_between(gates, i, j, convention):
    """Product of the decays between tokens i and j: PAPER's three readings, written as ranges of tokens."""
    low, high = min(i, j), max(i, j)
    if convention == "key":
        used = range(j, i) if i > j else range(i + 1, j + 1)
    elif convention == "query":
        used = range(j + 1, i + 1) if i > j else range(i, j)
    else:
        used = range(low + 1, high + 1)
    product = torch.ones((), dtype=torch.float64)
    for token in used:
        product = product * gates[token]
    return product


def definition(layer, x, feature_map):
    """One sequence, x: (L, width)."""
    length, width = x.shape
    heads = layer.heads
    weight, bias = layer.qkv.weight, layer.qkv.bias
    q, k, v = ((x @ weight[n * width : (n + 1) * width].T + bias[n * width : (n + 1) * width]).view(length, heads, -1) for n in range(3))
    q, k = feature_map(q), feature_map(k)
    if hasattr(layer.gate, "logit"):
        gates = torch.sigmoid(layer.gate.logit).expand(length, heads)
    elif hasattr(layer.gate, "projection"):
        gates = torch.sigmoid(x @ layer.gate.projection.weight.T + layer.gate.projection.bias)
    else:
        gates = torch.ones(length, heads, dtype=x.dtype)
    y = torch.zeros_like(v)
    for h in range(heads):
        rows = [[decay_between(gates[:, h], i, j, layer.convention) for j in range(length)] for i in range(length)]
        mask = torch.stack([torch.stack(row) for row in rows])
        scores = (q[:, h] @ k[:, h].T) * mask
        scores = scores / (scores.sum(1, keepdim=True) + 1e-6) if layer.scaled else scores / (width // heads) ** 0.5
        y[:, h] = scores @ v[:, h]
    return y.flatten(1) @ layer.output.weight.T + layer.output.bias


def phi(x):
    shifted = F.silu(x) + 0.5
    return shifted / shifted.square().sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize(("gate", "convention", "scale"), VARIANTS)
def test_equals_the_definition(gate, convention, scale):
    torch.manual_seed(0)
    layer = random_layer(gate=gate, convention=convention, scale=scale)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    expected = torch.stack([definition(layer, row, phi) for row in x])
    for form in FORMS:
        layer.form = form
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("gate", "convention", "scale"), VARIANTS)
def test_forms_agree_in_outputs_and_gradients(gate, convention, scale):
    torch.manual_seed(1)
    layer = random_layer(gate=gate, convention=convention, scale=scale)
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    mask = torch.arange(10) < torch.tensor([[10], [6]])
    results = {}
    for form in FORMS:
        layer.form = form
        layer.zero_grad()
        y = layer(x, mask)
        y.square().sum().backward()
        results[form] = y.detach(), [p.grad.clone() for p in layer.parameters()]
    for form in FORMS[1:]:
        torch.testing.assert_close(results[form], results["parallel"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", ["fixed", "selective"])
@pytest.mark.parametrize("gate_init", ["timescales", "random"])
def test_gradients_reach_the_gate(gate, gate_init, form):
    torch.manual_seed(2)
    layer = LinearAttention(8, 2, gate=gate, gate_init=gate_init, form=form, chunk_size=4)
    layer(torch.randn(2, 9, 8)).square().sum().backward()
    names = [name for name, _ in layer.gate.named_parameters()]
    assert names == (["logit"] if gate == "fixed" else ["projection.weight", "projection.bias"])
    for parameter in layer.gate.parameters():
        assert (parameter.grad != 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("saturation", [1e4, -1e4])
def test_saturated_gates_give_finite_outputs_and_gradients(saturation, form):
    torch.manual_seed(3)
    layer = LinearAttention(8, 2, form=form, chunk_size=4)
    with torch.no_grad():
        layer.gate.projection.bias.copy_(torch.tensor([saturation, 0.0]))
    y = layer(torch.randn(2, 9, 8))
    y.square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 1, 1), (1, 2, 5), (3, 1, 4), (2, 2, 1)])
def test_small_shapes(batch, heads, length, form):
    torch.manual_seed(4)
    layer = random_layer(heads=heads, form=form)
    x = torch.randn(batch, length, 8, dtype=torch.float64)
    expected = torch.stack([definition(layer, row, phi) for row in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_at_either_end_equals_cutting_it_off(side, convention, form):
    torch.manual_seed(5)
    layer = random_layer(convention=convention, form=form)
    x, padding = torch.randn(2, 6, 8, dtype=torch.float64), 50 * torch.randn(2, 3, 8, dtype=torch.float64)
    real = torch.ones(2, 9, dtype=torch.bool)
    (real[:, 6:] if side == "right" else real[:, :3]).zero_()
    padded = torch.cat([x, padding] if side == "right" else [padding, x], dim=1)
    torch.testing.assert_close(layer(padded, real)[real].view_as(x), layer(x), rtol=1e-10, atol=1e-10)


def test_operands_are_the_operators_keyword_arguments_but_the_form(monkeypatch):
    layer = LinearAttention(8, 2, gate="selective", convention="query", scale="none", chunk_size=5, form="chunkwise")
    seen = {}

    def operator(**arguments):
        seen.update(arguments)
        return arguments["v"]

    monkeypatch.setattr(ops, "bidirectional_linear_attention", operator)
    x, mask = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    layer(x, mask)
    operands = layer.operands(x, mask)
    assert seen.pop("form") == "chunkwise"
    assert set(seen) == set(operands)
    assert all(torch.equal(seen[key], value) if isinstance(value, torch.Tensor) else seen[key] == value for key, value in operands.items())
    assert operands["chunk_size"] == 5 and operands["scaled"] is False


def test_a_bug_planted_in_the_operator_or_the_gates_shows(monkeypatch):
    layer, x = random_layer(), torch.randn(1, 5, 8, dtype=torch.float64)
    good = layer(x)
    steps = ops.step_log_decays
    monkeypatch.setattr(ops, "step_log_decays", lambda log_gate, convention, **others: steps(log_gate, convention="query", **others))
    assert not torch.allclose(layer(x), good, rtol=1e-3)


@pytest.mark.parametrize("feature_map", ["silu_normalised", "softmax", "elu_plus_one"])
def test_under_autocast_the_gates_stay_float32_and_the_forms_agree(feature_map):
    torch.manual_seed(6)
    layer, x = LinearAttention(16, 2, feature_map=feature_map, chunk_size=4), torch.randn(2, 12, 16)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        operands = layer.operands(x)
        assert {operands[name].dtype for name in "qkv"} == {torch.bfloat16}
        assert operands["forward_log_decay"].dtype == operands["backward_log_decay"].dtype == torch.float32
        for form in FORMS:
            layer.form = form
            assert (layer(x) - exact).norm() / exact.norm() < 3e-2


def test_a_feature_map_that_widens_its_dtype_leaves_the_operands_alone():
    layer = LinearAttention(8, 2).bfloat16()
    layer.feature_map = lambda x: x.float().relu()  # as autocast does with exp on some devices
    operands = layer.operands(torch.randn(1, 3, 8, dtype=torch.bfloat16))
    assert {operands[name].dtype for name in "qkv"} == {torch.bfloat16}


def test_state_size_by_hand():
    # 3 heads of 4 keys and 4 values: 48 numbers in S, 12 in z, for two directions
    assert LinearAttention(12, 3).state_size == 2 * (48 + 12)
    assert LinearAttention(12, 3, scale="none").state_size == 2 * 48


def test_form_is_a_switch_among_the_operators_forms():
    layer = LinearAttention(8, 2)
    assert layer.form == "parallel" and layer.forms == tuple(ops.MODEL_FORMS) and set(FORMS) <= set(layer.forms)
    layer.form = "recurrent"
    assert layer.form == "recurrent" and "form=recurrent" in repr(layer)
    with pytest.raises(ValueError, match=r"form: got 'parralel', valid are .*'chunkwise', 'fused', 'auto'; did you mean 'parallel'"):
        layer.form = "parralel"
    assert layer.form == "recurrent"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads: expected a divisor of the width 8, got 3"),
        ({"heads": 0}, "heads: .* got 0"),
        ({"chunk_size": 0}, "chunk_size: .* got 0"),
        ({"convention": "keys"}, "convention: got 'keys', valid are 'key', 'query', 'symmetric'"),
        ({"gate_init": "hipo"}, "gate_init: got 'hipo'"),
        ({"form": "serial"}, "form: got 'serial'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(8, **{"heads": 2, **options})
