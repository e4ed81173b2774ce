"""The presets under conf/model and the paper's ablations of them: each composes and trains, each override changes the computation."""

import math
import warnings
from functools import cache

import pytest
import torch
import yaml
from torch.nn import functional as F

from lba_exp import build
from lba_exp.composing import compose, options
from lba_exp.data.spec import DataSpec
from lba_exp.errors import ConfigError
from lba_exp.nn.decay_groups import weight_decay_groups
from lba_exp.sweeping import plan as planning

TINY = ["model.width=8", "model.depth=2", "model.heads=2", "model.dropout=0", "model.mixer.chunk_size=5"]
LENGTH, CLASSES = 12, 3
SPEC = DataSpec("grid", LENGTH, CLASSES, ["a", "b", "c"], 1, None, {"train": 4}, "0", grid=(3, 4))
LINEAR = sorted(name for name in options("model") if not name.startswith("softmax"))

# rows of the paper's ablations: overrides, the first of which is the preset that the row varies
ABLATIONS = yaml.safe_load(options("sweeps")["paper_ablations"].read_text())["sweep"]["variants"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def composed(preset, *overrides):
    return compose([f"model={preset}", *TINY, *overrides])


def make(preset, overrides=()):
    cfg = composed(preset, *overrides)
    torch.manual_seed(0)
    return build.model(cfg.model, SPEC)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, LENGTH, 1, generator=generator), torch.arange(4) % CLASSES


def one_step(model):
    """Every trained parameter gets a finite gradient that is not zero throughout, and moves."""
    inputs, labels = batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.05), lr=1e-2)
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name
        assert name not in before or not torch.equal(parameter, before[name]), name
        if ".gate" in name and parameter.requires_grad:
            assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("preset", sorted(options("model")))
def test_every_preset_names_itself_and_its_source_and_takes_a_step(preset):
    first = options("model")[preset].read_text().splitlines()[0]
    assert first.startswith("# ") and "arXiv " in first
    assert composed(preset).model.name == preset
    one_step(make(preset))


@pytest.mark.parametrize("preset", LINEAR)
def test_the_forms_of_every_preset_agree(preset):
    model, (inputs, _) = make(preset).double().eval(), batch()
    assert model.forms == ("parallel", "recurrent", "chunkwise") and model.state_size > 0
    expected = model(inputs.double())
    for form in model.forms:
        model.set_form(form)
        torch.testing.assert_close(model(inputs.double()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("row", ABLATIONS)
def test_every_ablation_is_one_override_away_takes_a_step_and_differs(row):
    (job,) = planning.plan(["sweeps=paper_ablations", f"sweep.only=[{row}]"]).jobs
    preset, *overrides = ABLATIONS[row]
    preset = preset.removeprefix("model=")
    assert job.cfg.model == compose([f"model={preset}", *overrides]).model
    model, (inputs, _) = make(preset, overrides), batch()
    if overrides:
        assert not torch.allclose(model.eval()(inputs), make(preset).eval()(inputs), rtol=1e-3)
    one_step(model.train())


def test_retnet_forward_is_flash_linear_attentions_retention():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no GPU
        from fla.ops.retention.naive import naive_retention
    layer = make("retnet", ["model.mixer.direction=forward", "model.heads=4"]).mixers[0]
    x = torch.randn(2, 9, 8)
    q, k, v = layer.qkv(x).view(2, 9, 3, 4, 2).permute(2, 0, 3, 1, 4)
    retained = naive_retention(q, k, v).transpose(1, 2).flatten(2)  # scales q by 1 / sqrt(Dk)
    normed = F.group_norm(retained.flatten(0, 1), 4, layer.norm.weight, layer.norm.bias, layer.norm.eps).view_as(x)
    for form in layer.forms:
        layer.form = form
        torch.testing.assert_close(layer(x), layer.output(normed * F.silu(layer.output_gate(x))), rtol=1e-4, atol=1e-5)


def test_gated_rfa_forward_is_its_recurrence():
    """S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T and z alike (arXiv 2103.02143), in Python."""
    layer = make("gated_rfa", ["model.mixer.direction=forward"]).mixers[0].double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x)[0].view(7, 3, 2, 4).unbind(1)
    g = torch.sigmoid(layer.gate.projection(x))[0]
    state, z, rows = torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64), []
    for t in range(7):
        write = (1 - g[t])[:, None] * (F.elu(k[t]) + 1)
        state = g[t][:, None, None] * state + write[:, :, None] * v[t][:, None]
        z = g[t][:, None] * z + write
        phi = F.elu(q[t]) + 1
        rows.append(((phi[:, None] @ state)[:, 0] / ((phi * z).sum(-1, keepdim=True) + 1e-6)).flatten())
    torch.testing.assert_close(layer(x)[0], layer.output(torch.stack(rows)), rtol=1e-9, atol=1e-9)


def test_scaled_and_unscaled_linear_transformer_differ_by_the_row_sum():
    scaled, unscaled = make("linear_transformer").mixers[0], make("linear_transformer_unscaled").mixers[0]
    unscaled.load_state_dict(scaled.state_dict())
    x = torch.randn(1, 5, 8)
    one, other = scaled.operands(x), unscaled.operands(x)
    torch.testing.assert_close(other["q"] * math.sqrt(4), one["q"])
    assert (one["scaled"], other["scaled"]) == (True, False)


MISTAKES = {
    ("model=lion_s", "model.mixer.gate_init=hippo"): "model.mixer.gate_init=hippo needs one decay per channel",
    ("model=lion_lit", "model.mixer.scan=multi"): "model.mixer.scan=multi changes nothing without decay",
    ("model=softmax", "model.mixer.gate=fixed"): "model.mixer.gate=fixed has no meaning in softmax attention",
    ("model=softmax", "model.mixer.complement_keys=true"): "model.mixer.complement_keys=true has no meaning",
    ("model=lion_s_multiscan", "model.mixer.kind=softmax"): "model.mixer.scan=multi has no meaning in softmax attention",
    ("model.mixer.dt_min=1e-4",): "model.mixer.dt_min and dt_max are the step sizes of gate_init=hippo",
    ("model.mixer.norm=batch",): "model.mixer.norm=batch",
    ("model.pooling=class_token", "model.mixer.direction=forward"): "model.pooling=class_token reads the first token alone",
    ("model.mixer.diagonal=twice", "model.mixer.direction=backward"): "model.mixer.diagonal=twice is the plain sum",
}


@pytest.mark.parametrize("overrides", MISTAKES)
def test_settings_that_do_not_fit_are_refused_in_one_sentence(overrides):
    with pytest.raises(ConfigError) as error:
        compose(list(overrides))
    assert MISTAKES[overrides] in str(error.value) and "\n" not in str(error.value)


def test_a_scan_without_a_grid_is_refused():
    cfg = composed("lion_s_multiscan")
    flat = DataSpec("flat", LENGTH, CLASSES, ["a", "b", "c"], 1, None, {"train": 4}, "0")
    with pytest.raises(ConfigError, match=r"model\.mixer\.scan=multi reads a grid's tokens, and these data have none"):
        build.model(cfg.model, flat)


def test_a_class_token_is_known_to_the_scans_and_alternation_to_the_layers():
    model = make("lion_s_multiscan", ["model.pooling=class_token", "model.mixer.direction=alternating"])
    assert [mixer.direction for mixer in model.mixers] == ["forward", "backward"]
    assert model.mixers[0].orders.shape == (2, LENGTH + 1)
    assert model(batch()[0]).shape == (4, CLASSES)
