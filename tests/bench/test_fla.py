"""flash-linear-attention as a contender: what is computed with its kernel, on the CPU with a recurrence that stands in for it."""

import json
from importlib.machinery import ModuleSpec

import pytest
import torch

from lba_exp.bench import fla, operator
from lba_exp.bench.cases import Case, call, draw
from lba_exp.bench.settings import Settings
from lba_exp.commands import bench
from lba_exp.errors import ConfigError
from tests.ops import reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CALLS = []


def recurrence(q, k, v, g=None, g_gamma=None, scale=None):
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t: what the kernel's documentation says of it."""
    CALLS.append((tuple(v.shape), g is not None, g_gamma is not None, scale))
    decays = torch.zeros(q.shape[:3]) if g is None else g
    decays = decays if g_gamma is None else g_gamma.expand(q.shape[:3])
    state, rows = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        state = decays[:, t].exp()[..., None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append(scale * torch.einsum("bhd,bhde->bhe", q[:, t], state))
    return torch.stack(rows, 1), None


@pytest.fixture(autouse=True)
def _kernel(monkeypatch):
    CALLS.clear()
    monkeypatch.setattr(fla, "kernel", lambda: recurrence)


def close(found, right):
    assert (found.double() - right).norm() <= 2e-6 * right.norm()


def drawn(decay, **settings):
    case = Case(decay, "float32", 2, 13, Settings(lengths=(13,), heads=3, key_width=4, value_width=5, **settings))
    inputs = draw(case, CPU)
    if decay != "none":  # neither direction may take the other's
        inputs = type(inputs)(**vars(inputs) | {"backward_log_decay": 2 * inputs.backward_log_decay.roll(1, -1)})
    return case, inputs, (inputs.q, inputs.k, inputs.v, inputs.forward_log_decay, inputs.backward_log_decay)


@pytest.mark.parametrize("decay", ["none", "fixed", "selective"])
def test_the_numerators_of_one_and_of_two_passes(decay):
    case, inputs, tensors = drawn(decay, scaled=False)
    close(call("fla", case, inputs, False)(), reference.attention(*tensors, scaled=False, direction="forward"))
    (asked,) = CALLS
    assert asked == ((2, 13, 3, 5), decay == "selective", decay == "fixed", 1.0)
    close(call("fla-x2", case, inputs, False)(), reference.attention(*tensors, scaled=False))
    assert len(CALLS) == 3


@pytest.mark.parametrize(("decay", "way"), [("none", "sum"), *((d, w) for d in ("none", "fixed", "selective") for w in ("column", "pass"))])
def test_every_denominator_is_the_operators(decay, way):
    case, inputs, tensors = drawn(decay)
    close(call("fla-x2", case, inputs, False, way)(), reference.attention(*tensors, eps=1e-6))
    assert len(CALLS) == {"column": 2, "pass": 4, "sum": 2}[way]


def test_gradients_pass_through():
    case, inputs, tensors = drawn("selective")
    call("fla-x2", case, inputs, True, "column")()
    leaves = [x.clone().requires_grad_() for x in tensors]
    found = torch.autograd.grad(fla.both_directions(*leaves, "column", 1e-6), leaves, inputs.grad)
    exact = [x.double().requires_grad_() for x in tensors]
    right = torch.autograd.grad(reference.attention(*exact), exact, inputs.grad.double())
    for one, other in zip(found, right, strict=True):
        close(one, other)


def here(monkeypatch, tmp_path, *arguments, code=0):
    """``lba-bench operator`` where the kernel runs on the CPU; the cells by (form, pass, decay)."""
    monkeypatch.setattr(fla, "missing", lambda device: None)
    sizes = ["--device=cpu", "--threads=1", "--heads=2", "--key-width=8", "--value-width=4", "--repeats=2", "--seconds=0.002"]
    with pytest.raises(SystemExit) as end:
        bench.main(["operator", *sizes, "--lengths=20", *arguments, f"--output={tmp_path / 'out'}"])
    assert end.value.code == code
    cells = json.loads((tmp_path / "out" / "result.json").read_text())["cells"]
    return {(c["form"], c["pass"], c["decay"]): c for c in cells}, (tmp_path / "out" / "table.md").read_text()


def test_it_takes_its_turns_where_it_is_there(monkeypatch, tmp_path):
    cells, page = here(monkeypatch, tmp_path, "--decays=none,fixed,vector", "--passes=forward")
    for decay in ("none", "fixed"):
        assert all(cells[name, "forward", decay]["error"] < 2e-5 for name in fla.NAMES)
        assert cells["fla", "forward", decay]["denominator"] is None
        assert cells["fla-x2", "forward", decay]["denominator"] in (["sum"] if decay == "none" else ["column", "pass"])
        assert all(cells[name, "forward", decay]["form_over_copy"] > 0 for name in fla.NAMES)
    assert {cells[name, "forward", "vector"]["status"] for name in fla.NAMES} == {"not available here"}
    assert "one decay a head, not one a channel" in page and "of 2 cells)" in page


def test_a_backward_pass_that_it_refuses_is_an_empty_cell(monkeypatch, tmp_path):
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("this Triton is wrong here\nand more")

    monkeypatch.setattr(fla, "kernel", lambda: lambda *args, **options: (Refuses.apply(recurrence(*args, **options)[0]), None))
    cells, page = here(monkeypatch, tmp_path, "--decays=fixed", "--forms=fla,fla-x2,parallel", "--no-softmax")
    for name in fla.NAMES:
        refused = cells[name, "both", "fixed"]
        assert cells[name, "forward", "fixed"]["status"] == "measured" and refused["median_ms"] is None
        assert (refused["status"], refused["reason"]) == ("not available here", "RuntimeError: this Triton is wrong here")
    assert "fla-x2 not available here: RuntimeError: this Triton is wrong here" in page


def test_one_direction_is_of_one_pass(monkeypatch, tmp_path):
    cells, page = here(monkeypatch, tmp_path, "--decays=fixed", "--passes=forward", "--direction=backward", "--dtypes=float64,float32")
    assert cells["fla", "forward", "fixed"]["error"] < 2e-5, "judged by what it computes"
    assert cells["fla-x2", "forward", "fixed"]["status"] == "not available here"
    assert "is of both directions, not of 'backward' alone" in page and "'fla' has no float64" in page


@pytest.mark.parametrize("installed", [True, False])
def test_where_it_is_missing(monkeypatch, installed):
    monkeypatch.setattr(fla, "find_spec", lambda name: ModuleSpec(name, None) if installed else None)
    settings = Settings(lengths=(8,), forms=("parallel", "fla"))
    assert fla.missing(CPU).startswith("runs on CUDA alone")
    on_cuda = fla.missing(CUDA)
    if installed:
        assert on_cuda is None
        return
    monkeypatch.setattr(fla, "missing", lambda device: on_cuda)
    with pytest.raises(ConfigError) as error:
        operator.find_forms(settings, CPU)
    assert str(error.value) == "--forms fla: flash-linear-attention is not installed: pip install 'lba-exp[fla]'."
    assert not {*fla.NAMES} & {*operator.find_forms(Settings(lengths=(8,)), CPU)}


def test_the_real_one_has_the_arguments(monkeypatch):
    import inspect

    monkeypatch.undo()
    assert {"q", "k", "v", "g", "g_gamma", "scale"} <= {*inspect.signature(inspect.unwrap(fla.kernel())).parameters}
