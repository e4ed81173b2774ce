"""The selective scan: forms in PyTorch against its definition in float64, padding, what it refuses (kernels: ``test_fused_scan.py``)."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lba_exp.ops import selective_scan, selective_scan_obstacle

from .scan_case import definition, errors, mask_of, operands

TORCH_FORMS = ("parallel", "recurrent", "chunkwise", "auto")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@given(
    length=st.integers(1, 40),
    channels=st.integers(1, 5),
    state=st.integers(1, 9),
    direction=st.sampled_from(["forward", "backward"]),
    padded=st.sampled_from(["none", "left", "right", "holes"]),
    chunk_size=st.sampled_from([1, 3, 16]),
    largest=st.sampled_from([1e-3, 2.0, 1e4]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_torch_forms_are_the_definition(length, channels, state, direction, padded, chunk_size, largest, dtype, seed):
    inputs = operands(2, length, channels, state, largest=largest, seed=seed)
    options = {"direction": direction, "padding_mask": mask_of(padded, 2, length)}
    for form in TORCH_FORMS:
        found = errors(partial(selective_scan, form=form, chunk_size=chunk_size), inputs, [dtype] * 5, **options)
        assert max(found) < TOLERANCE[dtype], (form, found)


@pytest.mark.parametrize("form", TORCH_FORMS)
def test_half_precision_beside_step_sizes_in_float32(form):
    half = [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    found = errors(partial(selective_scan, form=form), operands(2, 30, 4, 8), half)
    assert max(found) < 1e-2, found


def test_auto_without_a_gpu_is_the_recurrent_form_and_chunkwise_where_it_is_compiled():
    inputs = [x.float() for x in operands(2, 40, 3, 4)]
    assert torch.equal(selective_scan(*inputs), selective_scan(*inputs, form="recurrent"))
    compiled = torch.compile(selective_scan, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), selective_scan(*inputs, form="chunkwise"))


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
        r"x: expected a non-empty tensor \(B, L, D\), got shape \(6, 3\)": (x[0], delta, a, b, c),
        r"x: expected a non-empty tensor \(B, L, D\), got shape \(2, 0, 3\)": (x[:, :0], delta, a, b, c),
        "x: expected torch.float64 or": (x.int(), delta, a, b, c),
        "x: expected a tensor .*, got list": ([1.0], delta, a, b, c),
        r"delta: expected .* = \(2, 6, 3\), got shape \(2, 5, 3\)": (x, delta[:, :5], a, b, c),
        "delta: expected a tensor .*, got NoneType": (x, None, a, b, c),
        "delta: expected torch.float64 or torch.float32, got torch.bfloat16": (x, delta.bfloat16(), a, b, c),
        "delta: expected step sizes >= 0, got -": (x, -delta, a, b, c),
        r"a: expected a non-empty tensor \(D, N\) with D = 3": (x, delta, a[:2], b, c),
        "a: expected torch.float64 or torch.float32, got torch.float16": (x, delta, a.half(), b, c),
        "a: expected rates <= 0": (x, delta, -a, b, c),
        r"b: expected .* = \(2, 6, 4\), got shape \(2, 6, 3\)": (x, delta, a, b[..., :3], c),
        r"c: expected .* = \(2, 6, 4\), got shape \(1, 6, 4\)": (x, delta, a, b, c[:1]),
        "c: expected the device of x, cpu, got meta": (x, delta, a, b, c.to("meta")),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            selective_scan(*arguments)
    for message, options in {
        "direction: got 'both'": {"direction": "both"},
        "form: got 'blockwise'": {"form": "blockwise"},
        "chunk_size: expected an integer >= 1, got 0": {"chunk_size": 0, "form": "parallel"},
        "padding_mask: expected a bool tensor": {"padding_mask": torch.ones(2, 6)},
        r"padding_mask: expected shape \(B, L\) = \(2, 6\)": {"padding_mask": torch.ones(6, dtype=torch.bool)},
        "'fused' takes float32, bfloat16 and float16, got torch.float64": {"form": "fused"},
    }.items():
        with pytest.raises(ValueError, match=message):
            selective_scan(x, delta, a, b, c, **options)
    with pytest.raises(ValueError, match=r"'fused' takes float32, bfloat16 and float16, got torch\.float64"):
        selective_scan(x.float(), delta.float(), a, b.float(), c.float(), form="fused")
    assert "states of 1, 2, 4" in selective_scan_obstacle(torch.device("cuda"), torch.float32, 12)
    monkeypatch.setattr("lba_exp.ops.fused_scan.operator.INTERPRETED", False)
    assert "CUDA" in selective_scan_obstacle(torch.device("cpu"), torch.float32, 16)
    with pytest.raises(ValueError, match="form: 'fused' "):
        selective_scan(x.float(), delta.float(), a.float(), b.float(), c.float(), form="fused")
