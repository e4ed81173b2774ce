"""Every combination of the layer's options: each form equals the dense float64 definition, gradients agree, nothing breaks at the edges."""

import inspect

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.conflicts import linear_conflict

from .layer_definition import definition

FORMS = ("parallel", "recurrent", "chunkwise")
GATES = ("none", "fixed", "selective", "fixed_vector", "selective_vector")
POSITIVE = ("elu_plus_one", "silu_normalised", "sigmoid", "softmax")
DEFAULTS = {name: p.default for name, p in inspect.signature(LinearAttention).parameters.items() if p.default is not p.empty}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(seed=0, width=4, heads=2, **options):
    """A float64 layer whose gates and norms are far from where they start, and all of its settings."""
    torch.manual_seed(seed)
    layer = LinearAttention(width, heads, chunk_size=3, **options).double()
    for name, parameter in layer.named_parameters():
        if name.startswith(("gate", "norm")):
            torch.nn.init.normal_(parameter)
    return layer, {**DEFAULTS, "width": width, "heads": heads, **options}


@st.composite
def variants(draw):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    options = {
        "heads": pick(1, 2),
        "gate": pick(*GATES),
        "convention": pick("key", "query", "symmetric"),
        "scale": pick("after", "before", "none"),
        "norm": pick("none", "layer", "rms", "group"),
        "direction": pick("both", "both", "forward", "backward", "alternating"),
        "scan": pick("raster", "raster", "snake", "multi"),
        "layer": pick(0, 1),
        "class_token": draw(st.booleans()),
    }
    # rows without a positive sum are not divided
    options["feature_map"] = pick(*POSITIVE, "identity", "relu") if options["scale"] == "none" else pick(*POSITIVE)
    if options["direction"] == "both":
        options["diagonal"] = pick("once", "once", "twice")
    if options["gate"] != "none":
        options["complement_keys"] = pick(False, False, True)
    if options["gate"].startswith("selective"):
        options["open_first"] = pick(False, False, True)
    if options["gate"] == "none" and options["direction"] == "both":
        options["scan"] = "raster"
    options["grid"] = None if options["scan"] == "raster" else pick((1, 3), (2, 2), (3, 2), (2, 4))
    length = draw(st.integers(1, 8))
    if options["grid"] is not None:
        length = options["grid"][0] * options["grid"][1] + options["class_token"]
    return options, length, pick("none", "none", "right", "left", "holes"), draw(st.integers(0, 2**31))


def mask_of(padded, length):
    if padded == "none":
        return None
    position = torch.arange(length)
    short = {"right": position < max(1, length - 2), "left": position >= min(2, length - 1), "holes": position % 3 != 1}[padded]
    return torch.stack([torch.ones(length, dtype=torch.bool), short])


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(variants())
def test_every_form_equals_the_definition(variant):
    options, length, padded, seed = variant
    layer, every = build(seed, **options)
    x, mask = torch.randn(2, length, 4, dtype=torch.float64), mask_of(padded, length)
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    with torch.no_grad():
        expected = torch.stack([definition(layer, row, keep, every) for row, keep in zip(x, real, strict=True)])
        for form in FORMS:
            layer.form = form
            torch.testing.assert_close(layer(x, mask)[real], expected[real], rtol=1e-9, atol=1e-9)


RICH = [
    {"gate": "selective", "scale": "before", "norm": "layer", "direction": "forward"},
    {"gate": "selective_vector", "scale": "after", "scan": "multi", "convention": "symmetric", "class_token": True},
    {"gate": "fixed_vector", "scale": "none", "norm": "group", "feature_map": "identity", "diagonal": "twice"},
    {"gate": "selective", "scale": "none", "scan": "multi", "complement_keys": True, "open_first": True, "norm": "rms"},
    {"gate": "fixed", "scale": "before", "scan": "snake", "direction": "alternating", "layer": 1},
]


@pytest.mark.parametrize("options", RICH)
def test_forms_agree_in_gradients(options):
    tokens = 6 + options.get("class_token", False)
    layer, _ = build(grid=(2, 3), **options)
    x = torch.randn(2, tokens, 4, dtype=torch.float64)
    mask = torch.arange(tokens) < torch.tensor([[tokens], [4]])
    results = {}
    for form in FORMS:
        layer.form = form
        layer.zero_grad()
        layer(x, mask)[mask].square().sum().backward()
        results[form] = [p.grad.clone() for p in layer.parameters()]
    for form in FORMS[1:]:
        torch.testing.assert_close(results[form], results["parallel"], rtol=1e-9, atol=1e-9)
    gates = [p for name, p in layer.named_parameters() if name.startswith("gate")]
    assert len(gates) == (1 if options["gate"].startswith("fixed") else 2) * (1 + (options.get("scan") == "multi"))
    assert all((p.grad != 0).any() for p in gates)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("saturation", [1e4, -1e4])
@pytest.mark.parametrize("options", [*RICH, {"gate": "selective", "complement_keys": True}])
def test_saturated_gates_give_finite_outputs_and_gradients(options, saturation, form):
    torch.manual_seed(0)
    layer = LinearAttention(4, 2, form=form, chunk_size=3, grid=(2, 3), **options)
    with torch.no_grad():
        for gate in (layer.gate, layer.gate2):
            if gate is not None:
                logits = gate.logit if options["gate"].startswith("fixed") else gate.projection.bias
                logits.view(-1)[0] = saturation
    y = layer(torch.randn(2, 6 + options.get("class_token", False), 4))
    y.square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("options", RICH)
def test_under_autocast_the_layer_keeps_the_dtype_and_the_forms_agree(options):
    torch.manual_seed(1)
    layer = LinearAttention(16, 2, chunk_size=4, grid=(3, 4), **options)
    x = torch.randn(2, 12 + options.get("class_token", False), 16)
    exact = layer(x)
    for form in FORMS:
        layer.form = form
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert (y - exact).norm() / exact.norm() < 5e-2


def test_state_size_of_directions_scans_and_scales():
    s, z = 3 * 4 * 4, 3 * 4  # 3 heads, 4 keys, 4 values

    def size(**options):
        return LinearAttention(12, 3, grid=(2, 2), **options).state_size

    assert size(direction="forward") == size(direction="alternating", layer=1) == s + z
    assert size(scale="before") == size(gate="fixed_vector") == size(scan="snake") == 2 * (s + z)
    assert size(scan="multi") == 4 * (s + z)
    assert size(scan="multi", scale="none", direction="backward") == 2 * s


def test_gates_that_are_not_trained_stay_and_get_no_gradient():
    layer = LinearAttention(8, 2, gate="fixed", gate_init="retnet", gate_trained=False)
    layer(torch.randn(1, 5, 8)).sum().backward()
    assert layer.gate.logit.grad is None and not layer.gate.logit.requires_grad


def test_a_scan_of_another_length_is_named():
    layer = LinearAttention(8, 2, scan="multi", grid=(2, 3), class_token=True)
    with pytest.raises(ValueError, match=r"length: expected 7 tokens, a grid of 2 x 3 and a class token, for scan='multi', got 6"):
        layer(torch.randn(1, 6, 8))


CONFLICTS = [
    ({"gate_init": "hippo"}, "gate_init=hippo needs one decay per channel: .* got gate=selective"),
    ({"gate": "fixed_vector", "gate_init": "retnet"}, "gate_init=retnet needs one decay per head"),
    ({"dt_min": 1e-4}, "dt_min and dt_max are the step sizes of gate_init=hippo"),
    ({"gate": "fixed_vector", "gate_init": "hippo", "dt_min": 0.2}, "dt_min=0.2 is above dt_max=0.1"),
    ({"gate": "none", "gate_trained": False}, "gate_trained=false needs a gate"),
    ({"gate": "none", "complement_keys": True}, "complement_keys=true needs a gate"),
    ({"gate": "none", "scan": "multi", "grid": (2, 2)}, "scan=multi changes nothing without decay"),
    ({"gate": "fixed", "open_first": True}, "open_first=true needs a gate per token"),
    ({"diagonal": "twice", "direction": "forward"}, "diagonal=twice .* needs direction=both, got forward"),
    ({"gate": "softplus_vector", "form": "chunkwise"}, "gate=softplus_vector .* needs form=parallel, got chunkwise"),
    ({"gate": "selective_vector", "form": "fused"}, "form=fused needs one decay per head: .* got gate=selective_vector"),
]


@pytest.mark.parametrize(("options", "message"), CONFLICTS)
def test_settings_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(8, 2, **options)
    assert linear_conflict({**DEFAULTS, **options}) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "first"}, "scale: got 'first', valid are 'after', 'before', 'none'"),
        ({"norm": "batch"}, "norm: got 'batch', valid are"),
        ({"direction": "left"}, "direction: got 'left', valid are .*'alternating'"),
        ({"diagonal": "thrice"}, "diagonal: got 'thrice', valid are 'once', 'twice'"),
        ({"scan": "spiral"}, "scan: got 'spiral', valid are 'raster', 'snake', 'multi'"),
        ({"scan": "snake"}, r"grid: expected \(height, width\), which scan='snake' needs, got None"),
        ({"scan": "snake", "grid": (0, 4)}, "grid height: expected an integer >= 1, got 0"),
        ({"gate": "fixed_vector", "gate_init": "hippo", "dt_min": 0.0}, "dt_min: expected a number above 0, got 0"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(8, 2, **options)


def test_a_growing_gate_runs_in_the_parallel_form_alone():
    torch.manual_seed(2)
    layer = LinearAttention(8, 2, gate="softplus_vector")
    assert layer.forms == ("parallel",)
    x = torch.randn(2, 5, 8)
    assert (layer.gate(x) > 0).all()
    layer(x).sum().backward()  # the operator's check of values is off inside the layer
    assert layer.gate.projection.weight.grad.abs().sum() > 0
    for form in ("recurrent", "auto"):
        with pytest.raises(ValueError, match=f"form: got '{form}', valid are 'parallel'"):
            layer.form = form
    from lba_exp import ops

    with pytest.raises(ValueError, match="expected log decays <= 0"):  # and on again outside
        ops.step_log_decays(layer.gate(x))
