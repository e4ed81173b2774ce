"""Gates: values against their definition, initial memory, precision, gradients."""

import math

import pytest
import torch

from lba_exp.nn import hippo
from lba_exp.nn.gates import (
    LONGEST_MEMORY,
    SHORTEST_MEMORY,
    FixedGate,
    FixedVectorGate,
    NoGate,
    SelectiveGate,
    SelectiveVectorGate,
    SoftplusVectorGate,
)
from lba_exp.registry import GATES


def test_registry_names_the_gates():
    scalar = {"none": NoGate, "fixed": FixedGate, "selective": SelectiveGate}
    vector = {"fixed_vector": FixedVectorGate, "selective_vector": SelectiveVectorGate, "softplus_vector": SoftplusVectorGate}
    assert {name: GATES[name] for name in scalar | vector} == scalar | vector


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
    kind, gate, x = gate, gate(32, 4), torch.randn(2, 6, 32)
    exact = gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gate(x)
    assert cast.dtype == torch.float32
    if kind is FixedGate:
        assert torch.equal(cast, exact)
    else:  # the product of a token is rounded, what it is added to is not
        products = (x.bfloat16() @ gate.projection.weight.bfloat16().T).float()
        rounded = torch.nn.functional.logsigmoid(products + gate.projection.bias)
        assert not torch.equal(cast, exact) and (cast - rounded).abs().max() <= 4e-3 * (x @ gate.projection.weight.T).abs().max()
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
    with pytest.raises(ValueError, match="gate_init: got 'hippo', valid are 'timescales', 'random', 'retnet'"):
        kind(8, 4, "hippo")


def test_retnets_decays_are_its_fractions():
    expected = [1 - 2.0 ** (-5 - h) for h in range(6)]
    assert FixedGate(12, 6, "retnet")(None).exp().tolist() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(SelectiveGate(12, 6, "retnet")(torch.zeros(1, 1, 12))[0, 0].exp(), torch.tensor(expected))


@pytest.mark.parametrize("init", ["timescales", "random"])
def test_decays_per_channel_equal_log_sigmoid(init):
    torch.manual_seed(6)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    fixed, selective = FixedVectorGate(12, 3, init).double(), SelectiveVectorGate(12, 3, init).double()
    assert fixed(x).shape == (3, 4) and selective(x).shape == (2, 5, 3, 4)
    torch.testing.assert_close(fixed(x), -torch.log1p(torch.exp(-fixed.logit)))
    logits = x @ selective.projection.weight.T + selective.projection.bias
    torch.testing.assert_close(selective(x), -torch.log1p(torch.exp(-logits)).view(2, 5, 3, 4))
    if init == "timescales":  # over the channels of each head
        memory = 1 / (1 - fixed(x).exp())
        assert memory[:, [0, -1]].tolist() == [pytest.approx([SHORTEST_MEMORY, LONGEST_MEMORY], rel=1e-3)] * 3
        torch.testing.assert_close(selective(torch.zeros(1, 1, 12))[0, 0], fixed(x).float(), check_dtype=False)


def test_a_growing_gate_is_the_softplus():
    torch.manual_seed(7)
    gate, x = SoftplusVectorGate(8, 2), torch.randn(2, 3, 8)
    logits = (x @ gate.projection.weight.T + gate.projection.bias).view(2, 3, 2, 4)
    torch.testing.assert_close(gate(x), torch.log1p(torch.exp(-logits)))
    assert gate.expanding and not SelectiveVectorGate(8, 2).expanding


@pytest.mark.parametrize("init", ["hippo", "hippo_lin"])
@pytest.mark.parametrize("dt_min", [1e-4, 1e-3])
def test_hippo_decays_start_at_the_diagonal_and_stay_below_one(init, dt_min):
    torch.manual_seed(8)
    heads, width = 16, 8
    rates, steps = hippo.rates(init, heads, width), hippo.draw_steps(heads, width, dt_min, 0.1)
    assert rates[0].tolist() == ([-(n + 1.0) for n in range(width)] if init == "hippo" else [-0.5] * width)
    assert steps.min() >= dt_min and steps.max() <= 0.1
    assert steps.log().mean().item() == pytest.approx(math.log(dt_min * 0.1) / 2, abs=0.6)  # uniform in the logarithm
    for kind in (FixedVectorGate, SelectiveVectorGate):
        gate = kind(heads * width, heads, init, log_decay=steps * rates)
        start = gate(torch.zeros(1, 1, heads * width)).reshape(heads, width)
        torch.testing.assert_close(start.double(), steps * rates, rtol=1e-4, atol=0)
    deviation = gate.projection.weight.std().item()
    assert deviation == pytest.approx(0.1, rel=0.05)
    assert (gate(1e3 * torch.randn(4, 9, heads * width)) <= 0).all()


def test_hippo_needs_its_diagonal():
    with pytest.raises(ValueError, match=r"log_decay: expected shape \(2, 4\) for gate_init='hippo', got None"):
        FixedVectorGate(8, 2, "hippo")


def test_hippo_sets_the_projections():
    """W_q, W_k ~ N(0, 0.1^2); the rows of W_v follow A^-1 (exp(Delta A) - 1), which is what a held input adds to a state."""
    torch.manual_seed(9)
    qkv, rate, step = torch.nn.Linear(256, 768), torch.tensor([[-3.0, -0.5]]), torch.tensor([[0.1, 0.02]])
    hold = hippo.zero_order_hold(rate, step)
    time = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    held = torch.trapezoid((rate * step)[..., None].double().mul(time).exp(), time) * step  # integral of exp(A s) over a step
    torch.testing.assert_close(hold.double(), held, rtol=1e-5, atol=0)
    hippo.initialise_projections(qkv, hold.repeat(1, 128))
    q, k, v = qkv.weight.chunk(3)
    assert q.std().item() == pytest.approx(0.1, rel=0.02) and k.std().item() == pytest.approx(0.1, rel=0.02)
    for row, size in ((0, hold[0, 0]), (1, hold[0, 1])):
        assert v[row::2].std().item() == pytest.approx(size.item() / 16, rel=0.05)
    assert (qkv.bias == 0).all()
