"""Gated Linear Attention: its gate and its output gate against their equations, the preset against flash-linear-attention."""

import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from lba_exp import build
from lba_exp.composing import compose
from lba_exp.convert import to_published
from lba_exp.errors import ConfigError, WeightsError
from lba_exp.models.pretrained import create
from lba_exp.nn import hippo
from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.decay_groups import weight_decay_groups
from lba_exp.nn.gates import LONGEST_MEMORY, SHORTEST_MEMORY, LowRankVectorGate
from lba_exp.registry import MIXERS

FORMS = ("parallel", "recurrent", "chunkwise")


def preset(width=8, heads=2, **overrides):
    cfg = compose(["model=gla", f"model.width={width}", f"model.heads={heads}", *(f"model.mixer.{k}={v}" for k, v in overrides.items())])
    settings = build.mixer(cfg.model, 0)
    torch.manual_seed(0)
    return MIXERS[settings.pop("kind")](width, heads, **settings)


def test_forward_is_flash_linear_attentions_gla():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no GPU
        from fla.ops.gla.naive import naive_recurrent_gla
    layer = preset(width=12, heads=3, direction="forward", chunk_size=4, gate_init="random")
    x = torch.randn(2, 9, 12)
    q, k, v = layer.qkv(x).view(2, 9, 3, 3, 4).unbind(2)
    read, _ = naive_recurrent_gla(q, k, v, layer.gate(x))  # scales q by 1 / sqrt(Dk)
    normed = F.group_norm(read.reshape(18, 12), 3, layer.norm.weight, layer.norm.bias, layer.norm.eps).view_as(x)
    for form in layer.forms:
        layer.form = form
        torch.testing.assert_close(layer(x), layer.output(normed * F.silu(layer.output_gate(x))), rtol=1e-4, atol=1e-5)


def test_the_gate_is_its_equation():
    torch.manual_seed(1)
    gate, x = LowRankVectorGate(24, 3, "random").double(), torch.randn(2, 5, 24, dtype=torch.float64)
    assert gate.down.weight.shape == (16, 24) and gate.down.bias is None and gate.per_channel
    logits = x @ gate.down.weight.T @ gate.up.weight.T + gate.up.bias
    torch.testing.assert_close(gate(x), (torch.sigmoid(logits) ** (1 / 16)).log().view(2, 5, 3, 8))
    assert LowRankVectorGate(8, 2).down.weight.shape == (8, 8)


def test_initialisations_mean_what_they_mean_elsewhere():
    torch.manual_seed(2)
    width, heads = 256, 4
    nothing, normed = torch.zeros(1, 1, width), F.layer_norm(torch.randn(4, 64, width), (width,))
    gate = LowRankVectorGate(width, heads)
    memory = 1 / (1 - gate(nothing)[0, 0].double().exp())
    ratio = (LONGEST_MEMORY / SHORTEST_MEMORY) ** (1 / 63)
    assert memory.tolist() == [pytest.approx([SHORTEST_MEMORY * ratio**n for n in range(64)], rel=1e-3)] * heads
    deviation = F.linear(gate.down(normed), gate.up.weight).std().item()
    assert deviation == pytest.approx(0.1, rel=0.2)
    middle = 1 / (1 - LowRankVectorGate(width, heads, "random")(normed).double().exp()).median()
    assert middle.item() == pytest.approx(1 / (1 - 0.5 ** (1 / 16)), rel=0.15)
    rates, steps = hippo.rates("hippo", heads, 64), hippo.draw_steps(heads, 64, 1e-3, 0.1)
    gate = LowRankVectorGate(width, heads, "hippo", log_decay=rates * steps)
    torch.testing.assert_close(gate(nothing)[0, 0].double(), rates * steps, rtol=1e-4, atol=0)
    assert (gate.up.weight @ gate.down.weight).std().item() == pytest.approx(0.1, rel=0.1)
    assert LinearAttention(8, 2, gate="low_rank_vector", gate_init="hippo").gate(torch.zeros(1, 1, 8)).max() < 0
    with pytest.raises(ValueError, match="gate_init=retnet needs one decay per head"):
        LinearAttention(8, 2, gate="low_rank_vector", gate_init="retnet")


def test_the_gate_stays_float32_under_autocast_and_is_spared_weight_decay():
    torch.manual_seed(3)
    layer, x = preset(), torch.randn(2, 5, 8)
    exact = layer.gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.gate(x), exact) and exact.dtype == torch.float32
        assert layer(x).dtype == torch.bfloat16
    assert layer.gate.bfloat16()(x.bfloat16()).dtype == torch.float32
    decayed = {id(p) for p in weight_decay_groups(layer, 0.1)[0]["params"]}
    assert not any(id(p) in decayed for p in layer.gate.parameters()) and id(layer.output_gate.weight) in decayed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("saturation", [1e5, -1e5])
def test_saturated_gates_give_finite_gradients(saturation, form):
    layer = preset(form=form, chunk_size=4)
    with torch.no_grad():
        layer.gate.up.bias[:3] = saturation
    x = torch.randn(2, 9, 8)
    log_gate = layer.gate(x)
    assert log_gate.isfinite().all() and (log_gate <= 0).all()
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in layer.parameters())


@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
def test_forms_agree_in_outputs_and_gradients_with_padding(direction):
    layer = preset(direction=direction, chunk_size=3).double()
    x, mask = torch.randn(2, 10, 8, dtype=torch.float64), torch.arange(10) < torch.tensor([[10], [6]])
    results = {}
    for form in FORMS:
        layer.form = form
        layer.zero_grad()
        y = layer(x, mask)
        y[mask].square().sum().backward()
        results[form] = y.detach(), [p.grad.clone() for p in layer.parameters()]
        padded = torch.cat([50 * torch.randn(2, 2, 8, dtype=torch.float64), x, x[:, :3]], dim=1)
        real = F.pad(torch.ones(2, 10, dtype=torch.bool), (2, 3))
        torch.testing.assert_close(layer(padded, real)[real].view_as(x), layer(x), rtol=1e-10, atol=1e-10)
    for form in FORMS[1:]:
        torch.testing.assert_close(results[form], results["parallel"], rtol=1e-9, atol=1e-9)
    assert layer.state_size == (2 if direction == "both" else 1) * 2 * 4 * 4


@pytest.mark.parametrize(("name", "activation"), [("silu", lambda x: x / (1 + (-x).exp())), ("sigmoid", lambda x: 1 / (1 + (-x).exp()))])
def test_output_gates_multiply_what_comes_out_of_the_norm(name, activation):
    torch.manual_seed(4)
    plain, gated = LinearAttention(8, 2, norm="rms").double(), LinearAttention(8, 2, norm="rms", output_gate=name).double()
    assert set(gated.load_state_dict(plain.state_dict(), strict=False).missing_keys) == {"output_gate.weight", "output_gate.bias"}
    plain.output, x = torch.nn.Identity(), torch.randn(2, 5, 8, dtype=torch.float64)
    gate = activation(x @ gated.output_gate.weight.T + gated.output_gate.bias)
    torch.testing.assert_close(gated(x), gated.output(plain(x) * gate), rtol=1e-12, atol=1e-12)
    assert f"output_gate={name}" in repr(gated)


def test_an_output_gate_that_is_unknown_or_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match="output_gate: got 'tanh', valid are 'none', 'silu', 'sigmoid'"):
        LinearAttention(8, 2, output_gate="tanh")
    with pytest.raises(ConfigError, match=r"model\.mixer\.output_gate=silu has no meaning in softmax attention"):
        compose(["model=softmax", "model.mixer.output_gate=silu"])
    with pytest.raises(ConfigError, match=r"model\.mixer\.form=fused needs one decay per head: .* got gate=low_rank_vector"):
        compose(["model=gla", "model.mixer.form=fused"])
    with pytest.raises(ConfigError, match=r"model\.mixer\.output_gate=tanh"):
        compose(["model=gla", "model.mixer.output_gate=tanh"])


def test_a_model_with_an_output_gate_has_no_place_in_the_published_naming():
    mixer = {"kind": "linear", "gate": "selective", "feature_map": "identity", "scale": "none"}
    config = {"kind": "masked_lm", "vocabulary": 11, "length": 6, "width": 8, "depth": 1, "heads": 2}
    assert to_published(create(config | {"mixer": mixer}))
    with pytest.raises(WeightsError, match=r"no place for .*output_gate"):
        to_published(create(config | {"mixer": mixer | {"output_gate": "silu"}}))


def test_the_first_gate_may_be_open():
    layer = LinearAttention(8, 2, gate="low_rank_vector", open_first=True, convention="key")
    decay = layer.operands(torch.randn(1, 4, 8))["forward_log_decay"]
    assert (decay[:, 1] == 0).all() and (decay[:, 2:] < 0).all() and math.isfinite(decay.sum().item())
