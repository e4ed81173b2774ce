"""RWKV-6's time mixing against its equations in float64, token by token, and against flash-linear-attention."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lba_exp.nn.decay_groups import weight_decay_groups
from lba_exp.nn.gates import LONGEST_MEMORY, SHORTEST_MEMORY
from lba_exp.nn.rwkv6 import RWKV6

FORMS = ("parallel", "recurrent", "chunkwise")
DIRECTIONS = ("both", "forward", "backward")


def build(seed=0, width=8, heads=2, **options):
    """A float64 layer whose mixtures, decays, bonus and norm are far from where they start."""
    torch.manual_seed(seed)
    layer = RWKV6(width, heads, chunk_size=3, shift_rank=3, decay_rank=5, **options).double()
    for name, parameter in layer.named_parameters():
        if name.startswith(("shift", "gate", "bonus", "norm")):
            torch.nn.init.normal_(parameter, std=0.7)
    return layer


def definition(layer, x, direction):
    """One sequence of real tokens, x: (L, width): equations 14 to 22, in loops."""
    length, width = x.shape
    heads, nothing = layer.heads, torch.zeros(width, dtype=x.dtype)
    projected = {name: [] for name in "rkvgw"}
    weights = {"r": layer.receptance, "k": layer.key, "v": layer.value, "g": layer.output_gate}
    shift, gate = layer.shift, layer.gate
    for i in range(length):
        before, after = x[i - 1] if i > 0 else nothing, x[i + 1] if i + 1 < length else nothing
        half = torch.cat([before[: width // 2], after[width // 2 :]])
        change = {"forward": before, "backward": after, "both": half}[direction] - x[i]
        z = x[i] + change * shift.input_mix
        for n, name in enumerate("rkvgd"):
            a, b = shift.down.weight[3 * n : 3 * n + 3], shift.up[n]
            mixed = x[i] + change * (shift.mix[n] + torch.tanh(z @ a.T) @ b)
            if name == "d":
                d = gate.up.bias + torch.tanh(mixed @ gate.down.weight.T) @ gate.up.weight.T
                projected["w"].append(torch.exp(-torch.exp(d)).view(heads, -1))
            else:
                projected[name].append((mixed @ weights[name].weight.T).view(heads, -1))
    r, k, v, g, w = (torch.stack(projected[name]) for name in "rkvgw")
    r, u = r / (width // heads) ** 0.5, layer.bonus.view(heads, -1)
    y = (r * u * k).sum(-1, keepdim=True) * v
    for name, order in (("forward", range(length)), ("backward", reversed(range(length)))):
        if direction not in ("both", name):
            continue
        state = torch.zeros(heads, width // heads, width // heads, dtype=x.dtype)
        for i in order:
            y[i] += (r[i, :, None] @ state)[:, 0]
            state = w[i, :, :, None] * state + k[i, :, :, None] * v[i, :, None]
    centred = y - y.mean(-1, keepdim=True)
    normed = (centred / (centred.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()).flatten(1)
    g = g.flatten(1)
    return ((normed * layer.norm.weight + layer.norm.bias) * g / (1 + (-g).exp())) @ layer.output.weight.T


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(DIRECTIONS), st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(0, 2**31))
def test_every_form_equals_the_definition(direction, heads, length, seed):
    layer = build(seed, heads=heads, direction=direction)
    x = torch.randn(2, length, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([definition(layer, row, direction) for row in x])
        for form in FORMS:
            layer.form = form
            torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_read_is_flash_linear_attentions_rwkv6(direction):
    """A run from either end, the token's own term in one of them alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no GPU
        from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
    layer, x = build(direction=direction).float(), torch.randn(2, 9, 8)
    mixed = layer.shift(x)
    r, k, v = (f(y).view(2, 9, 2, 4).transpose(1, 2) for f, y in zip((layer.receptance, layer.key, layer.value), mixed, strict=False))
    log_w, u = layer.gate(mixed[-1]).transpose(1, 2), layer.bonus.view(2, 4)
    forward, _ = naive_recurrent_rwkv6(r, k, v, log_w, u)  # scales r by 1 / sqrt(Dk)
    own = torch.zeros_like(u) if direction == "both" else u
    backward, _ = naive_recurrent_rwkv6(*(y.flip(2) for y in (r, k, v, log_w)), own)
    read = {"forward": forward, "backward": backward.flip(2), "both": forward + backward.flip(2)}[direction]
    seen = []
    layer.norm.register_forward_pre_hook(lambda norm, args: seen.append(args[0]))
    for form in FORMS:
        layer.form = form
        layer(x)
        torch.testing.assert_close(seen.pop(), read.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


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


def test_what_stands_in_a_hole_does_not_matter_but_states_pass_it():
    layer, x = build(), torch.randn(1, 7, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, False, False, True]])
    y = layer(x, mask)
    other = torch.where(mask[..., None], x, 50.0)
    torch.testing.assert_close(layer(other, mask)[mask], y[mask], rtol=1e-12, atol=1e-12)
    for token, reached in ((6, [0, 1, 3, 6]), (0, [0, 1, 3, 6]), (3, [0, 1, 3, 6])):
        (grad,) = torch.autograd.grad(y[0, token].sum(), x, retain_graph=True)
        assert (grad[0] != 0).any(-1).nonzero().flatten().tolist() == reached


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("direction", "reached"), [("forward", [0, 1, 2, 3]), ("backward", [3, 4, 5]), ("both", [0, 1, 2, 3, 4, 5])])
def test_a_direction_sees_its_side_alone(direction, reached, form):
    layer, x = build(direction=direction, form=form), torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0, 3].sum(), x)
    assert (grad[0].abs() > 1e-12).any(-1).nonzero().flatten().tolist() == reached


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("saturation", [1e4, 20.0, -1e4])
def test_saturated_decays_give_finite_outputs_and_gradients(saturation, form):
    torch.manual_seed(1)
    layer = RWKV6(8, 2, form=form, chunk_size=4)
    with torch.no_grad():
        layer.gate.up.bias[:3] = saturation
    log_decay = layer.operands(torch.randn(2, 9, 8))[0]["forward_log_decay"]
    assert (log_decay <= 0).all() and log_decay.min() >= -1.0001e4
    y = layer(torch.randn(2, 9, 8))
    y.square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() and (p.grad != 0).any() for p in layer.parameters())


def test_decays_start_with_the_memories_of_the_other_gates_and_mixtures_near_their_vectors():
    torch.manual_seed(2)
    layer, x = RWKV6(128, 2), F.layer_norm(torch.randn(3, 9, 128), (128,))
    memory = 1 / (1 - layer.gate(x).double().exp())
    ratio = (LONGEST_MEMORY / SHORTEST_MEMORY) ** (1 / 63)
    expected = torch.tensor([SHORTEST_MEMORY * ratio**n for n in range(64)], dtype=torch.float64)
    torch.testing.assert_close(memory, expected.expand(3, 9, 2, -1), rtol=1e-2, atol=0)
    change = torch.cat([F.pad(x, (0, 0, 1, 0))[:, :-1, :64], F.pad(x, (0, 0, 0, 1))[:, 1:, 64:]], dim=-1) - x
    place = torch.arange(64).repeat(2) / 64
    torch.testing.assert_close(layer.shift(x)[1], x + change * (1 - place**0.5), rtol=1e-3, atol=1e-3)
    assert layer.shift.up.shape == (5, 32, 128) and layer.gate.down.weight.shape == (64, 128)
    assert RWKV6(8, 2).gate.down.weight.shape == (8, 8)  # at most the width


def test_under_autocast_decays_stay_float32_and_weight_decay_spares_all_but_projections():
    torch.manual_seed(3)
    layer, x = RWKV6(16, 2, chunk_size=4), torch.randn(2, 12, 16)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward, backward = layer.operands(x)
        assert {forward[name].dtype for name in "qkv"} == {torch.bfloat16} and backward["forward_log_decay"] is None
        assert forward["forward_log_decay"].dtype == backward["backward_log_decay"].dtype == torch.float32
        for form in FORMS:
            layer.form = form
            y = layer(x)
            assert y.dtype == torch.bfloat16 and (y - exact).norm() / exact.norm() < 5e-2
    decayed = {id(p) for p in weight_decay_groups(layer, 0.1)[0]["params"]}
    projections = {"receptance.weight", "key.weight", "value.weight", "output_gate.weight", "output.weight"}
    assert {name for name, p in layer.named_parameters() if id(p) in decayed} == projections
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_bad_arguments_are_named():
    for options, message in (
        ({"heads": 3}, "heads: expected a divisor of the width 8, got 3"),
        ({"decay_rank": 0}, "decay_rank: .* got 0"),
        ({"form": "fused"}, "form: got 'fused', valid are 'parallel', 'recurrent', 'chunkwise', 'auto'"),
    ):
        with pytest.raises(ValueError, match=message):
            RWKV6(8, **{"heads": 2, **options})
    with pytest.raises(ValueError, match=r"padding_mask: expected torch.bool of shape \(1, 4\)"):
        RWKV6(8, 2)(torch.randn(1, 4, 8), torch.ones(1, 3, dtype=torch.bool))
