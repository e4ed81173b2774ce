"""Several scans normalised together: the mean of their parts, in every form, and what does not fit."""

import contextlib
import dataclasses

import pytest
import torch

from lba_exp.ops import bidirectional_linear_attention_parts as parts
from lba_exp.ops import bidirectional_linear_attention_scans as attention
from lba_exp.ops.fused import operator

from .compare import Case, error, leaves
from .test_fused import blocks

FUSED = pytest.param("fused", marks=pytest.mark.skipif(not operator.INTERPRETED, reason="on a GPU test_fused_gpu.py runs it"))
FORMS = ["parallel", "recurrent", "chunkwise", FUSED]
CASES = {
    "selective": Case(length=37, padded="holes"),
    "fixed": Case(length=21, kinds=("fixed", "fixed"), padded="right"),
    "fixed and none": Case(length=21, kinds=("none", "fixed"), heads=3),
    "one direction": Case(length=40, direction="backward", diagonal_weight=0.5),
    "no decay": Case(length=19, kinds=("none", "none"), padded="left"),
}


def inputs(case, scans, dtype):
    """q, k, v, both decays of the scans, stacked; mask and orders."""
    cases = [dataclasses.replace(case, seed=case.seed + n) for n in range(scans)]
    *tensors, mask = case.tensors()
    decays = [None if one[0] is None else torch.stack(one) for one in zip(*(c.tensors()[3:5] for c in cases), strict=True)]
    generator = torch.Generator().manual_seed(scans)
    orders = torch.stack([torch.randperm(case.length, generator=generator) for _ in range(scans)]).to(tensors[0].device)
    return [None if x is None else x.to(dtype) for x in (*tensors[:3], *decays)], mask, orders


def definition(q, k, v, f, g, orders, eps, **options):
    """Means of the parts, written out, in float64."""
    q, k, v, f, g = (None if x is None else x.double() for x in (q, k, v, f, g))
    each = [
        parts(q, k, v, None if f is None else f[n], None if g is None else g[n], token_order=order, form="parallel", **options)
        for n, order in enumerate(orders)
    ]
    num, den = (sum(x) / len(orders) for x in zip(*each, strict=True))
    mask = options["padding_mask"]
    if mask is not None:
        den = den.masked_fill(~mask[:, :, None], 1.0)
    return num / (den + eps)[..., None]


def results(function, tensors):
    given = leaves(tensors)
    y = function(*given)
    grads = torch.autograd.grad(y.double().square().sum(), [x for x in given if x is not None], allow_unused=True)
    return [y, *(x for x in grads if x is not None)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scans", [1, 2, 3])
def test_it_is_the_mean_of_the_parts(form, name, scans):
    if form == "fused" and scans == 3 and name != "selective":
        pytest.skip("an interpreted kernel takes its time")
    case = CASES[name]
    dtype = torch.float32 if form == "fused" else torch.float64
    tensors, mask, orders = inputs(case, scans, dtype)
    options = {"padding_mask": mask, "direction": case.direction, "diagonal_weight": case.diagonal_weight}
    eps = 0.5  # large enough to be seen: one for all scans together
    found = results(lambda *x: attention(*x, token_order=orders, form=form, eps=eps, **options), tensors)
    expected = results(lambda *x: definition(*x, orders, eps, **options), tensors)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-10
    assert found[0].dtype == dtype and len(found) == len(expected)
    assert all(error(x, y) < tolerance for x, y in zip(found, expected, strict=True))


@pytest.mark.skipif(not operator.INTERPRETED, reason="on a GPU test_fused_gpu.py runs it")
@pytest.mark.parametrize("name", ["selective", "fixed"])
def test_several_blocks_tiles_and_segments(name):
    from .poison import poisoned

    case = dataclasses.replace(CASES[name], length=70, batch=1, heads=2)
    tensors, mask, orders = inputs(case, 2, torch.float32)
    options = {"token_order": orders, "padding_mask": mask}
    with blocks(32), poisoned():
        found = results(lambda *x: attention(*x, form="fused", **options), tensors)
    expected = results(lambda *x: attention(*x, form="parallel", **options), [None if x is None else x.double() for x in tensors])
    assert all(error(x, y) < 2e-5 for x, y in zip(found, expected, strict=True))


@pytest.mark.skipif(not operator.INTERPRETED, reason="needs Triton's interpreter")
def test_opcheck():
    case = Case(length=11, batch=1, heads=2, kinds=("fixed", "selective"), padded="holes")
    tensors, mask, orders = inputs(case, 2, torch.float32)
    given = (*leaves(tensors), mask, orders, 1.0, True, True, 1e-6)
    with blocks(16):
        torch.library.opcheck(torch.ops.lba_exp.fused_scans_forward.default, given)
        with torch.no_grad():
            out, den = torch.ops.lba_exp.fused_scans_forward(*given)
        q, k, v, f, g, *rest = (x.detach() if isinstance(x, torch.Tensor) else x for x in given)
        given = (q, k, v, f, g, *rest[:2], out, den, torch.rand_like(out), True, True, *rest[2:])
        torch.library.opcheck(torch.ops.lba_exp.fused_scans_backward.default, given)


@pytest.mark.parametrize("form", ["chunkwise", FUSED])
def test_it_compiles_in_one_graph_with_and_without_autocast(form):
    tensors, mask, orders = inputs(Case(length=19, batch=1, heads=2, padded="holes"), 2, torch.float32)

    def function(*tensors):
        return attention(*tensors, token_order=orders, padding_mask=mask, form=form)

    torch._dynamo.reset()
    with blocks(16) if form == "fused" else contextlib.nullcontext():
        expected = results(function, tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = results(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors)
    assert all(error(x, y) < 1e-6 for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_order": torch.arange(5)}, r"token_order: expected an int64 tensor \(S, L\), the order of each scan, got \(5,\)"),
        ({"token_order": torch.zeros(2, 5, dtype=torch.int64)}, r"token_order: expected each of 0 \.\.\. 4 once"),
        ({"token_order": torch.arange(4)[None]}, r"token_order: expected an int64 tensor \(L,\) = \(5,\), got torch.int64 \(4,\)"),
        ({"forward_log_decay": -torch.ones(2)}, r"forward_log_decay: expected None or the decays of 2 scans, stacked, got \(2,\)"),
        ({"backward_log_decay": -torch.ones(3, 2)}, r"backward_log_decay: expected None or the decays of 2 scans, stacked, got \(3, 2\)"),
        ({"backward_log_decay": -torch.ones(2, 3)}, r"backward_log_decay: expected one of the shapes \(2,\), .* got \(3,\)"),
        ({"eps": -1.0}, r"eps: expected a finite number >= 0"),
        ({"form": "scan"}, r"form: got 'scan', valid are"),
    ],
)
def test_what_does_not_fit(change, message):
    q = torch.randn(1, 5, 2, 3)
    options = {"token_order": torch.stack([torch.arange(5), torch.arange(5).flip(0)])} | change
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, **options)


@pytest.mark.skipif(not operator.INTERPRETED, reason="needs Triton's interpreter")
def test_decays_per_channel_are_refused_by_the_fused_form():
    q = torch.randn(1, 5, 2, 3)
    orders = torch.stack([torch.arange(5), torch.arange(5).flip(0)])
    with pytest.raises(ValueError, match="form: 'fused' has one decay per head"):
        attention(q, q, q, -torch.ones(2, 2, 3), token_order=orders, form="fused")
