"""The decay of each step, from gates: the three conventions against their mask written out."""

import pytest
import torch

from lba_exp.ops import CONVENTIONS, bidirectional_linear_attention_parts, decays, step_log_decays
from lba_exp.ops.decays import doubling_sums, grouped_sums

from .compare import error


def mask_entry(gate, convention, i, j):
    """M_ij as the product of gates that the convention names; indices from 0."""
    if i == j:
        return 1.0
    if convention == "key":
        span = range(j, i) if i > j else range(i + 1, j + 1)
    elif convention == "query":
        span = range(j + 1, i + 1) if i > j else range(i, j)
    else:
        span = range(min(i, j) + 1, max(i, j) + 1)
    product = 1.0
    for t in span:
        product *= gate[t].item()
    return product


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise", "blockwise"])
def test_conventions(form, convention):
    length = 13
    torch.manual_seed(0)
    gate = torch.rand(length, dtype=torch.float64)
    decays = step_log_decays(gate.log()[None, :, None], convention)
    # the unit vectors as values read the mask off the output
    ones = torch.ones(1, length, 1, 1, dtype=torch.float64)
    values = torch.eye(length, dtype=torch.float64)[None, :, None]
    num, _ = bidirectional_linear_attention_parts(ones, ones, values, *decays, form=form, chunk_size=4)
    expected = torch.tensor([[mask_entry(gate, convention, i, j) for j in range(length)] for i in range(length)], dtype=torch.float64)
    assert error(num[0, :, 0], expected) < 1e-14


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 3, 4)])
def test_shape_dtype_and_edges(convention, shape):
    gate = -torch.rand(shape)
    forward, backward = step_log_decays(gate, convention)
    assert forward.shape == backward.shape == gate.shape and forward.dtype == backward.dtype == gate.dtype
    assert forward[:, 0].abs().max() == 0 and backward[:, -1].abs().max() == 0


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_fixed_and_none_come_back_unchanged(convention):
    assert step_log_decays(None, convention) == (None, None)
    for gate in (-torch.rand(3), -torch.rand(3, 4)):
        assert all(x is gate for x in step_log_decays(gate, convention))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_one_token(convention):
    forward, backward = step_log_decays(torch.full((1, 1, 1), -2.0), convention)
    assert forward.item() == backward.item() == 0


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_blocks_of_a_sequence(convention):
    gate = -torch.rand(2, 10, 3)
    whole = step_log_decays(gate, convention)
    cut = 4
    first = step_log_decays(gate[:, :cut], convention, after=gate[:, cut])
    second = step_log_decays(gate[:, cut:], convention, before=gate[:, cut - 1])
    for i in range(2):
        assert torch.equal(torch.cat([first[i], second[i]], dim=1), whole[i])


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("dim", [-1, -2])
def test_sums_without_cumsum(dim, length):
    x = torch.rand(2, length, length, dtype=torch.float64)
    assert error(doubling_sums(x, dim), x.cumsum(dim)) < 1e-14


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("length", [1, 4, 5, 37])
def test_sums_in_groups(dim, length, monkeypatch):
    monkeypatch.setattr(decays, "GROUP", 4)
    x = torch.rand(2, 3, length if dim == -2 else 2, length if dim == -1 else 1, dtype=torch.float64).requires_grad_()
    y, expected = grouped_sums(x, dim), x.cumsum(dim)
    weights = torch.rand_like(y)
    grads = (torch.autograd.grad((z * weights).sum(), x)[0] for z in (y, expected))
    assert y.shape == x.shape and error(y, expected) < 1e-14 and error(*grads) < 1e-14


def test_gradients_reach_the_gates():
    gate = (-torch.rand(1, 6, 2)).requires_grad_()
    forward, backward = step_log_decays(gate, "key")
    (forward + backward).sum().backward()
    assert torch.equal(gate.grad[:, 1:-1], torch.full((1, 4, 2), 2.0))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"log_gate": -torch.rand(2, 5, 3), "convention": "keys"}, "convention.*'keys'.*'key', 'query', 'symmetric'.*did you mean 'key'"),
        ({"log_gate": torch.rand(2, 5, 3) + 0.1}, "log_gate.*<= 0"),
        ({"log_gate": -torch.rand(1, 2, 5, 3, 1)}, "log_gate.*shape"),
        ({"log_gate": -torch.rand(2, 5, 3).half()}, "log_gate.*dtype"),
        ({"log_gate": 0.5}, "log_gate.*float"),
        ({"log_gate": -torch.rand(3), "before": -torch.rand(3)}, "before"),
        ({"log_gate": None, "after": -torch.rand(3)}, "after"),
        ({"log_gate": -torch.rand(2, 5, 3), "after": -torch.rand(2, 4)}, "after.*\\(2, 3\\)"),
    ],
)
def test_errors(arguments, name):
    with pytest.raises(ValueError, match=name):
        step_log_decays(**arguments)
