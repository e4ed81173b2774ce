"""What must not change a result, and what changes it in a known way."""

import pytest
import torch

from lba_exp.ops import bidirectional_linear_attention

from .compare import FORMS, KINDS, Case, error

SEQUENCES = ("selective", "selective_vector")


def run(form, q, k, v, f, b, mask=None, chunk_size=8, **options):
    return bidirectional_linear_attention(q, k, v, f, b, padding_mask=mask, form=form, chunk_size=chunk_size, **options)


def along(tensors, change):
    """Apply ``change`` to what has a time dimension."""
    return [x if x is None or x.ndim < 3 else change(x) for x in tensors]


def close(y, expected):
    assert error(y, expected) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_at_an_end_equals_cutting_it_off(form, side, kind):
    *tensors, _ = Case(kinds=(kind, kind), length=37, dtype=torch.float64).tensors()
    kept = slice(11, None) if side == "left" else slice(None, 26)
    mask = torch.zeros(2, 37, dtype=torch.bool)
    mask[:, kept] = True
    y = run(form, *tensors, mask)
    close(y[:, kept], run(form, *along(tensors, lambda x: x[:, kept])))
    assert y[~mask].abs().max() == 0


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("form", FORMS)
def test_a_hole_with_open_gates_equals_removing_the_token(form, kind):
    *tensors, _ = Case(kinds=(kind, kind), dtype=torch.float64).tensors()
    mask = torch.ones(2, 37, dtype=torch.bool)
    holes = [3, 8, 9, 20, 31]
    mask[:, holes] = False
    for gate in tensors[3:]:
        gate[:, holes] = 0.0
    kept = [i for i in range(37) if i not in holes]
    close(run(form, *tensors, mask)[:, kept], run(form, *along(tensors, lambda x: x[:, kept])))


@pytest.mark.parametrize("value", [1e30, -1e30])
@pytest.mark.parametrize("form", FORMS)
def test_padded_values_never_matter(form, value):
    *tensors, mask = Case(padded="holes").tensors()
    results = []
    for filler in (0.0, value):
        inputs = [x.masked_fill(~mask[:, :, None, None], filler).requires_grad_() for x in tensors[:3]]
        inputs += [x.clone().requires_grad_() for x in tensors[3:]]
        y = run(form, *inputs, mask)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kinds", [("selective", "selective_vector"), ("none", "selective"), ("fixed", "fixed_vector")], ids="-".join)
@pytest.mark.parametrize("form", FORMS)
def test_reversing_the_sequence_and_swapping_the_decays_reverses_the_output(form, kinds):
    *tensors, mask = Case(kinds=kinds, padded="holes", dtype=torch.float64).tensors()
    q, k, v, f, b = along(tensors, lambda x: x.flip(1))
    close(run(form, q, k, v, b, f, mask.flip(1)).flip(1), run(form, *tensors, mask))


@pytest.mark.parametrize("kind", ["fixed", *SEQUENCES])
@pytest.mark.parametrize("form", FORMS)
def test_the_directions_and_the_diagonal_add_up(form, kind):
    *tensors, _ = Case(kinds=(kind, kind), dtype=torch.float64).tensors()
    parts = {d: run(form, *tensors, scaled=False, direction=d, diagonal_weight=0.0) for d in ("forward", "backward")}
    q, k, v = tensors[:3]
    diagonal = (q * k).sum(-1, keepdim=True) * v
    for weight in (0.0, 1.0, 2.0, -0.3):
        expected = parts["forward"] + parts["backward"] + weight * diagonal
        close(run(form, *tensors, scaled=False, diagonal_weight=weight), expected)


@pytest.mark.parametrize("kind", ["fixed_vector", *SEQUENCES])
@pytest.mark.parametrize("form", FORMS)
def test_copies_along_batch_and_heads_copy_the_output(form, kind):
    *tensors, mask = Case(kinds=(kind, kind), padded="holes", dtype=torch.float64).tensors()
    y = run(form, *tensors, mask)
    copied = [torch.cat([x, x]) if x.ndim > 2 else x for x in tensors]
    close(run(form, *copied, torch.cat([mask, mask])), torch.cat([y, y]))
    copied = [torch.cat([x, x], dim=2 if x.ndim > 2 else 0) for x in tensors]
    close(run(form, *copied, mask), torch.cat([y, y], dim=2))


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("form", ["chunkwise", "blockwise"])
def test_the_chunk_size_is_not_a_part_of_the_result(form, kind):
    *tensors, mask = Case(kinds=(kind, kind), level="mixed", padded="holes", length=70, dtype=torch.float64).tensors()
    expected = run("recurrent", *tensors, mask)
    for chunk_size in (1, 5, 7, 16, 69, 70, 71, 1000):
        close(run(form, *tensors, mask, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("form", FORMS)
def test_deterministic(form):
    *tensors, mask = Case(padded="holes", length=300, chunk_size=8).tensors()
    results = []
    for _ in range(2):
        inputs = [x.clone().requires_grad_() for x in tensors]
        y = run(form, *inputs, mask)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("form", FORMS)
def test_deterministic_algorithms_of_a_gpu(form, kind, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    *tensors, mask = Case(kinds=(kind, kind), padded="holes", length=300).tensors()
    expected = run(form, *tensors, mask)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            inputs = [x.cuda().requires_grad_() for x in tensors]
            y = run(form, *inputs, mask.cuda())
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert error(results[0][0].cpu(), expected) <= 2e-5


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_left_as_they_are_and_may_be_strided(form):
    *tensors, mask = Case(padded="holes", dtype=torch.float64).tensors()
    y = run(form, *tensors, mask)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    copies = [x.clone() for x in strided]
    close(run(form, *strided, mask), y)
    assert all(torch.equal(x, copy) for x, copy in zip(strided, copies, strict=True))
