"""Gates: values against their definition, initial memory, precision, gradients."""

import math

import pytest
import torch

from lba_exp.nn.gates import LONGEST_MEMORY, SHORTEST_MEMORY, FixedGate, NoGate, SelectiveGate
from lba_exp.registry import GATES


def test_registry_names_the_gates():
    assert {name: GATES[name] for name in GATES.names} == {"none": NoGate, "fixed": FixedGate, "selective": SelectiveGate}


def test_shapes_dtypes_and_sign():
    x = torch.randn(2, 5, 8)
    assert NoGate(8, 4)(x) is None
    fixed, selective = FixedGate(8, 4)(x), SelectiveGate(8, 4)(x)
    assert fixed.shape == (4,) and selective.shape == (2, 5, 4)
    assert fixed.dtype == selective.dtype == torch.float32
    assert (fixed <= 0).all() and (selective <= 0).all()


@pytest.mark.parametrize("init", ["timescales", "random"])
def test_values_equal_log_sigmoid(init):
    torch.manual_seed(1)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    fixed, selective = FixedGate(8, 4, init).double(), SelectiveGate(8, 4, init).double()
    assert fixed(x).tolist() == pytest.approx([-math.log1p(math.exp(-a)) for a in fixed.logit.tolist()], rel=1e-12)
    logits = x @ selective.projection.weight.T + selective.projection.bias
    expected = [-math.log1p(math.exp(-a)) for a in logits.flatten().tolist()]
    assert selective(x).flatten().tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("heads", [2, 4, 7])
def test_timescales_are_log_spaced_memories(heads):
    memory = 1 / (1 - FixedGate(8, heads)(torch.zeros(1, 1, 8)).double().exp())
    ratio = (LONGEST_MEMORY / SHORTEST_MEMORY) ** (1 / (heads - 1))
    expected = [SHORTEST_MEMORY * ratio**h for h in range(heads)]
    assert memory.tolist() == pytest.approx(expected, rel=1e-3)


def test_one_head_remembers_the_geometric_mean():
    memory = 1 / (1 - FixedGate(8, 1)(torch.zeros(1, 1, 8)).exp())
    assert memory.item() == pytest.approx(math.sqrt(SHORTEST_MEMORY * LONGEST_MEMORY), rel=1e-4)


@pytest.mark.parametrize("width", [16, 256])
def test_selective_gate_starts_near_its_bias_whatever_the_width(width):
    torch.manual_seed(2)
    gate = SelectiveGate(width, 4)
    x = torch.nn.functional.layer_norm(torch.randn(8, 64, width), (width,))
    logits = x @ gate.projection.weight.T
    assert 0.03 < logits.std().item() < 0.3
    bias_alone = torch.nn.functional.logsigmoid(gate.projection.bias)
    torch.testing.assert_close(gate(torch.zeros(1, 1, width))[0, 0], bias_alone)
    torch.testing.assert_close(bias_alone, FixedGate(width, 4)(x))


def test_random_init_is_the_papers():
    torch.manual_seed(3)
    assert FixedGate(8, 4000, "random").logit.std().item() == pytest.approx(1, abs=0.05)
    torch.manual_seed(4)
    linear = torch.nn.Linear(8, 4)
    torch.manual_seed(4)
    assert torch.equal(SelectiveGate(8, 4, "random").projection.weight, linear.weight)


@pytest.mark.parametrize("gate", [FixedGate, SelectiveGate])
def test_stays_float32_under_autocast_and_for_bfloat16_weights(gate):
    torch.manual_seed(5)
    gate, x = gate(32, 4), torch.randn(2, 6, 32)
    exact = gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gate(x)
    assert cast.dtype == torch.float32 and torch.equal(cast, exact)
    assert gate.bfloat16()(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", [FixedGate, SelectiveGate])
def test_saturated_gates_have_finite_values_and_gradients(kind, sign):
    gate = kind(4, 2)
    x = torch.ones(1, 3, 4, requires_grad=True)
    with torch.no_grad():
        (gate.logit if kind is FixedGate else gate.projection.bias).fill_(sign * 1e4)
    log_gate = gate(x)
    log_gate.sum().backward()
    assert log_gate.isfinite().all() and (log_gate <= 0).all()
    assert all(p.grad.isfinite().all() for p in gate.parameters())


@pytest.mark.parametrize("kind", [NoGate, FixedGate, SelectiveGate])
def test_unknown_initialisation_names_the_valid_ones(kind):
    with pytest.raises(ValueError, match="gate_init: got 'hippo', valid are 'timescales', 'random'"):
        kind(8, 4, "hippo")
