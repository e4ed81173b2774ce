"""The selective scan: every form, the kernels in Triton's interpreter among them, against its definition in float64."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lba_exp.ops import selective_scan, selective_scan_obstacle
from lba_exp.ops.fused.operator import INTERPRETED

from .poison import _Torch
from .scan_case import definition, errors, operands

TORCH_FORMS = ("parallel", "recurrent", "chunkwise", "auto")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton, and its interpreter: on a GPU tests/gpu runs")


@contextmanager
def poisoned():
    """What the kernels write to is NaN before they run."""
    from lba_exp.ops.fused_scan import launch

    launch.torch = _Torch()
    try:
        yield
    finally:
        launch.torch = torch


def mask_of(kind, batch, length):
    if kind == "none":
        return None
    places = torch.arange(length).expand(batch, length)
    return {"left": places >= length // 3, "right": places < length - length // 3, "holes": places % 3 != 1}[kind]


@given(
    length=st.integers(1, 40),
    channels=st.integers(1, 5),
    state=st.integers(1, 9),
    direction=st.sampled_from(["forward", "backward"]),
    padded=st.sampled_from(["none", "left", "right", "holes"]),
    chunk_size=st.sampled_from([1, 3, 16]),
    largest=st.sampled_from([1e-3, 2.0, 1e4]),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_torch_forms_are_the_definition(length, channels, state, direction, padded, chunk_size, largest, seed):
    inputs = operands(2, length, channels, state, largest=largest, seed=seed)
    options = {"direction": direction, "padding_mask": mask_of(padded, 2, length)}
    for form in TORCH_FORMS:
        found = errors(partial(selective_scan, form=form, chunk_size=chunk_size), inputs, [torch.float64] * 5, **options)
        assert max(found) < 1e-9, (form, found)


@interpreted
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("length", "channels", "state", "padded"),
    [(1, 3, 4, "none"), (35, 33, 16, "none"), (16, 32, 1, "left"), (33, 5, 8, "holes"), (17, 2, 32, "right")],
)
def test_the_kernels_are_the_definition(length, channels, state, padded, direction):
    inputs = operands(2, length, channels, state, seed=length)
    with poisoned():
        options = {"direction": direction, "padding_mask": mask_of(padded, 2, length)}
        found = errors(partial(selective_scan, form="fused"), inputs, [torch.float32] * 5, **options)
    assert max(found) < 2e-5, found


@interpreted
def test_the_kernels_take_what_saturates_and_what_is_in_half_precision():
    x, delta, a, b, c = operands(1, 20, 4, 4)
    delta[:, ::3] = 1e4
    delta[:, 1::3] = 0
    found = errors(partial(selective_scan, form="fused"), [x, delta, a, b, c], [torch.float32] * 5)
    assert max(found) < 2e-5, found
    half = [torch.float16, torch.float32, torch.float32, torch.float16, torch.float16]
    found = errors(partial(selective_scan, form="fused"), operands(1, 20, 4, 4), half)
    assert max(found) < 1e-2, found


@interpreted
def test_the_kernels_are_one_operation_to_torch():
    inputs = [x.float().requires_grad_() for x in operands(1, 18, 3, 2)]
    mask = torch.arange(18)[None] < 15
    operation, kinds = torch.ops.lba_exp.selective_scan.default, ("test_schema", "test_faketensor")
    torch.library.opcheck(operation, (*inputs, mask, False, True), test_utils=kinds)
    with torch.no_grad():
        again = selective_scan(*inputs, form="fused")  # without what a backward pass would need
    assert torch.equal(again, selective_scan(*inputs, form="fused"))
    with pytest.raises(RuntimeError, match="first derivative"):
        (slope,) = torch.autograd.grad(selective_scan(*inputs, form="fused").square().sum(), inputs[0], create_graph=True)
        slope.sum().backward()


def test_padding_at_either_end_is_cutting_it_off():
    x, delta, a, b, c = operands(1, 12, 3, 4)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 3:9] = True
    cut = [y[:, 3:9] for y in (x, delta)], [y[:, 3:9] for y in (b, c)]
    for direction in ("forward", "backward"):
        whole = selective_scan(x, delta, a, b, c, direction=direction, padding_mask=mask)
        torch.testing.assert_close(whole[:, 3:9], definition(*cut[0], a, *cut[1], direction=direction))
        assert (whole[:, :3] == 0).all() and (whole[:, 9:] == 0).all()


def test_mistakes_name_the_argument(monkeypatch):
    x, delta, a, b, c = operands(2, 6, 3, 4)
    wrong = {
        "x: expected": (x[0], delta, a, b, c),
        "delta: expected": (x, delta[:, :5], a, b, c),
        r"a: expected \(D, N\) with D = 3": (x, delta, a[:2], b, c),
        "b: expected": (x, delta, a, b[..., :3], c),
        "c: expected": (x, delta, a, b, c[:1]),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            selective_scan(*arguments)
    with pytest.raises(ValueError, match="direction: "):
        selective_scan(x, delta, a, b, c, direction="both")
    with pytest.raises(ValueError, match="form: "):
        selective_scan(x, delta, a, b, c, form="blockwise")
    with pytest.raises(ValueError, match=r"padding_mask: expected torch\.bool"):
        selective_scan(x, delta, a, b, c, padding_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"'fused' takes float32, bfloat16 and float16, got torch\.float64"):
        selective_scan(x, delta, a, b, c, form="fused")
    assert "states of 1, 2, 4" in selective_scan_obstacle(torch.device("cuda"), torch.float32, 12)
    monkeypatch.setattr("lba_exp.ops.fused_scan.operator.INTERPRETED", False)
    assert "runs on CUDA devices" in selective_scan_obstacle(torch.device("cpu"), torch.float32, 16)
