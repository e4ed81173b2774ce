"""The selective scan's kernels in Triton's interpreter, against the definition in float64, and the operation of torch around them."""

from functools import partial

import pytest
import torch

from lba_exp.ops import selective_scan
from lba_exp.ops.fused.operator import INTERPRETED

from .scan_case import definition, error, errors, mask_of, operands, poisoned

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton, and its interpreter: on a GPU tests/gpu runs")
OPS = torch.ops.lba_exp
fused = partial(selective_scan, form="fused")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("length", "channels", "state", "padded"),
    [(1, 3, 4, "none"), (35, 33, 16, "none"), (16, 32, 1, "left"), (33, 5, 8, "holes"), (17, 2, 32, "right")],
)
def test_the_kernels_are_the_definition(length, channels, state, padded, direction):
    inputs = operands(2, length, channels, state, seed=length)
    with poisoned():
        found = errors(fused, inputs, [torch.float32] * 5, direction=direction, padding_mask=mask_of(padded, 2, length))
    assert max(found) < 2e-5, found


def test_closed_and_open_states_and_half_precision():
    x, delta, a, b, c = operands(1, 20, 4, 4)
    delta[:, ::3] = 1e4
    delta[:, 1::3] = 0
    found = errors(fused, [x, delta, a, b, c], [torch.float32] * 5)
    assert max(found) < 2e-5, found
    half = [torch.float16, torch.float32, torch.float32, torch.float16, torch.float16]
    found = errors(fused, operands(1, 20, 4, 4), half)
    assert max(found) < 1e-2, found


def test_slow_decays_do_not_drift():
    """Steps of one size: the rounding of one decay, 200 times over, would be 1e-6 of what the first token wrote."""
    x, delta, a, b, c = operands(1, 200, 32, 4)
    x[:, 0] *= 100
    delta[:] = torch.logspace(-5, -4, 32)
    a[:] = -torch.arange(1, 5)
    inputs = [y.float() for y in (x.abs(), delta, a, b.abs(), c.abs())]
    with torch.no_grad():
        assert error(fused(*inputs), definition(*(y.double() for y in inputs))) < 5e-7


def test_a_mask_and_inputs_in_several_pieces():
    """One row of a mask for all sequences; x, b and c as parts of one product."""
    x, delta, a, b, c = (y.float() for y in operands(3, 7, 3, 4))
    mask = (torch.arange(7) < 5).expand(3, 7)
    parts = torch.cat([x, b, c], dim=-1).split((3, 4, 4), dim=-1)
    found = fused(parts[0], delta, a, *parts[1:], padding_mask=mask)
    assert error(found, definition(x, delta, a, b, c, padding_mask=mask)) < 1e-6
    turned = torch.rand(7, 3).gt(0.4).t()
    assert error(fused(x, delta, a, b, c, padding_mask=turned), definition(x, delta, a, b, c, padding_mask=turned)) < 1e-6


def test_the_kernels_are_one_operation_to_torch():
    inputs = [x.float().requires_grad_() for x in operands(1, 18, 3, 2)]
    mask = torch.arange(18)[None] < 15
    kinds = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.selective_scan.default, (*inputs, mask, False, True), test_utils=kinds)
    with torch.no_grad():
        y, borders = OPS.selective_scan(*inputs, mask, False, True)
    given = [x.detach() for x in inputs]
    torch.library.opcheck(OPS.selective_scan_backward.default, (torch.ones_like(y), *given, mask, borders, False), test_utils=kinds)
    with torch.no_grad():
        again = fused(*inputs)  # without what a backward pass would need
    assert torch.equal(again, fused(*inputs))
    with pytest.raises(RuntimeError, match="first derivative"):
        (slope,) = torch.autograd.grad(fused(*inputs).square().sum(), inputs[0], create_graph=True)
        slope.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: 2 * fused(*x, direction="backward"), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (18, 21) if dynamic else (18,):
        inputs = [x.float().requires_grad_() for x in operands(1, length, 3, 2)]
        found, expected = compiled(*inputs), 2 * fused(*inputs, direction="backward")
        results = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)]
        assert torch.equal(found, expected) and all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(wanted):
    inputs = [x.float() for x in operands(1, 9, 3, 2)]

    def gradient(*which):
        given = [x.clone().requires_grad_(i in which) for i, x in enumerate(inputs)]
        return torch.autograd.grad(fused(*given).square().sum(), given[wanted])[0]

    assert torch.equal(gradient(wanted), gradient(*range(5)))


def test_autocast_changes_nothing():
    inputs = [x.float().requires_grad_() for x in operands(1, 9, 3, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(*inputs)
    assert y.dtype == torch.float32 and torch.equal(y, fused(*inputs))
