"""Tokens read in an order of their own: as if they were stored in it, and put back."""

import pytest
import torch
from torch.autograd import forward_ad

from lba_exp.ops import bidirectional_linear_attention as attention
from lba_exp.ops import bidirectional_linear_attention_parts as parts
from lba_exp.ops.fused import operator

from .compare import Case, error, leaves

FORMS = ["parallel", "recurrent", "chunkwise", "blockwise"]
FUSED = pytest.param("fused", marks=pytest.mark.skipif(not operator.INTERPRETED, reason="on a GPU test_fused_gpu.py runs it"))
CASES = {
    "selective": Case(length=37, padded="holes"),
    "fixed and none": Case(length=21, kinds=("fixed", "none"), padded="right"),
    "one direction": Case(length=40, direction="backward", diagonal_weight=0.5),
    "no decay": Case(length=19, kinds=("none", "none"), padded="left"),
}


def reordered(tensors, mask, order):
    """Inputs as they are stored, whose tokens at ``order`` are those given; decays stay as they are read."""
    q, k, v, *decays = tensors
    back = order.argsort()
    return [*(x[:, back] for x in (q, k, v)), *decays], None if mask is None else mask[:, back]


@pytest.mark.parametrize("form", [*FORMS, FUSED])
@pytest.mark.parametrize("name", CASES)
def test_an_order_is_a_way_to_read(form, name):
    case = CASES[name]
    dtype = torch.float32 if form == "fused" else torch.float64
    *tensors, mask = case.tensors()
    tensors = [None if x is None else x.to(dtype) for x in tensors]
    order = torch.randperm(case.length, generator=torch.Generator().manual_seed(1))
    order = torch.stack([order, order.flip(0)], 1)[:, 0]  # a view with gaps
    stored, stored_mask = reordered(tensors, mask, order)
    results = []
    for inputs, own_mask, own_order in ((tensors, mask, None), (stored, stored_mask, order)):
        inputs = leaves(inputs)
        options = {"padding_mask": own_mask, "token_order": own_order, "form": form}
        options |= {"direction": case.direction, "diagonal_weight": case.diagonal_weight}
        y = attention(*inputs, **options)
        num, den = parts(*inputs, **options)
        grads = torch.autograd.grad(sum(x.square().sum() for x in (y, num, den)), [x for x in inputs if x is not None], allow_unused=True)
        results.append(([y, num, den, *grads[:3]], [x for x in grads[3:] if x is not None]))
    (one, one_decays), (other, other_decays) = results
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert all(error(x, y[:, order]) < tolerance for x, y in zip(one, other, strict=True))
    assert all(error(x, y) < tolerance for x, y in zip(one_decays, other_decays, strict=True))


def test_derivatives_of_any_kind():
    *tensors, _ = Case(length=9, key_width=2, value_width=3, batch=1, heads=1).tensors()
    q, k, v, f, b = (x.double() for x in tensors)
    order = torch.randperm(9)

    def function(q, k, v):
        return attention(q, k, v, f, b, token_order=order, form="parallel")

    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    with forward_ad.dual_level():
        y = function(forward_ad.make_dual(q.detach(), torch.ones_like(q)), k.detach(), v.detach())
        assert forward_ad.unpack_dual(y).tangent is not None
    assert torch.func.vmap(function)(*(torch.stack([x.detach()] * 2) for x in inputs)).shape == (2, 1, 9, 1, 3)


def test_it_compiles_in_one_graph():
    *tensors, _ = Case(length=12).tensors()
    order = torch.randperm(12)

    def function(*tensors):
        return attention(*tensors, token_order=order, form="chunkwise")

    torch._dynamo.reset()
    assert error(torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves(tensors)), function(*tensors)) < 1e-6


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 2], r"token_order: expected an int64 tensor \(L,\) = \(3,\), got list"),
        (torch.arange(4), r"token_order: expected an int64 tensor \(L,\) = \(3,\), got torch.int64 \(4,\)"),
        (torch.arange(3, dtype=torch.int32), r"token_order: expected an int64 tensor \(L,\) = \(3,\), got torch.int32 \(3,\)"),
        (torch.tensor([0, 2, 2]), r"token_order: expected each of 0 \.\.\. 2 once"),
        (torch.tensor([0, 1, 3]), r"token_order: expected each of 0 \.\.\. 2 once"),
    ],
    ids=["list", "length", "dtype", "twice", "beyond"],
)
def test_an_order_that_is_none(order, message):
    q = torch.randn(1, 3, 1, 2)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, token_order=order)
