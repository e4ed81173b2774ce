"""The selective scan's kernels on a GPU, against float64: `pytest -m gpu tests/gpu/test_selective_scan.py`."""

from functools import partial

import pytest
import torch

from lba_exp.ops import selective_scan
from lba_exp.ops.fused_scan.operator import LARGEST_STATE
from tests.ops.scan_case import error, errors, mask_of, operands, poisoned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
fused = partial(selective_scan, form="fused")
# tokens, channels, state: every state is a launch of its own; channels short of a block, one, and several with a rest
SHAPES = [(1, 40, 16), (1, 3, 64), (2, 33, 1), (5, 32, 2), (17, 70, 4), (33, 32, 32), (50, 384, 16), (197, 96, 8), (300, 40, 64)]
SHAPES += [(1500, 32, 16), (4096, 33, 1), (4096, 32, 8), (4096, 40, 16), (4096, 32, 64)]


def check(inputs, dtype, **options):
    dtypes = [dtype, torch.float32, torch.float32, dtype, dtype]
    with poisoned():
        found = errors(fused, inputs, dtypes, **options)
    assert max(found) < (2e-5 if dtype == torch.float32 else 1e-2), found


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("length", "channels", "state"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_the_definition(length, channels, state, padded, direction, dtype):
    inputs = operands(2, length, channels, state, seed=length, device="cuda")
    mask = torch.rand(2, length, device="cuda", generator=torch.Generator("cuda").manual_seed(length)) > 0.3 if padded else None
    if mask is not None:
        mask[:, 0] = True
    check(inputs, dtype, direction=direction, padding_mask=mask)


def test_every_state_is_tried():
    assert {state for *_, state in SHAPES} == {2**i for i in range(LARGEST_STATE.bit_length())}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("slowest", [1e-5, 1e-3])
def test_slow_decays_of_one_step_size(slowest, direction):
    """Where a factor's rounding would be the same at every token, and add up."""
    x, delta, a, b, c = operands(1, 4096, 32, 16, device="cuda")
    delta[:] = slowest * torch.logspace(0, 1, 32, device="cuda")
    a[:] = -torch.arange(1, 17, device="cuda")
    check([x, delta, a, b, c], torch.float32, direction=direction)


@pytest.mark.parametrize("padded", ["left", "right", "holes"])
def test_closed_and_open_states_under_an_expanded_mask(padded):
    x, delta, a, b, c = operands(3, 70, 40, 16, device="cuda")
    delta[:, ::3] = 1e4
    delta[:, 1::3] = 0
    check([x, delta, a, b, c], torch.float32, padding_mask=mask_of(padded, 3, 70, "cuda")[:1].expand(3, 70))


def test_two_runs_are_equal():
    inputs = [x.float().requires_grad_() for x in operands(4, 300, 96, 16, device="cuda")]
    runs = []
    for _ in range(2):
        y = fused(*inputs)
        runs.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_auto_is_the_kernels_where_they_run():
    inputs = [x.float() for x in operands(2, 60, 40, 16, device="cuda")]
    assert torch.equal(selective_scan(*inputs), fused(*inputs))
    doubles = [x.double() for x in inputs]
    assert torch.equal(selective_scan(*doubles), selective_scan(*doubles, form="chunkwise"))
    other = [x.float() for x in operands(2, 60, 40, 12, device="cuda")]
    assert error(selective_scan(*other), selective_scan(*other, form="recurrent")) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_same(dtype):
    x, delta, a, b, c = operands(2, 60, 40, 16, device="cuda")
    inputs = [y.requires_grad_() for y in (x.to(dtype), delta.float(), a.float(), b.to(dtype), c.to(dtype))]

    def double(*given):
        return 2 * selective_scan(*given)

    torch._dynamo.reset()
    expected, found = double(*inputs), torch.compile(double, fullgraph=True)(*inputs)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(one, other)
