"""The selective scan's kernels on a GPU, against float64: `pytest -m gpu tests/gpu/test_selective_scan.py`."""

from functools import partial

import pytest
import torch

from lba_exp.ops import selective_scan
from tests.ops.scan_case import errors, operands

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = [(1, 40, 16), (2, 33, 1), (50, 384, 16), (197, 96, 8), (300, 40, 64), (1500, 32, 16), (33, 32, 32)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("length", "channels", "state"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_the_definition(length, channels, state, padded, direction, dtype):
    inputs = operands(2, length, channels, state, seed=length, device="cuda")
    mask = torch.rand(2, length, device="cuda") > 0.3 if padded else None
    if mask is not None:
        mask[:, 0] = True
    dtypes = [dtype, torch.float32, torch.float32, dtype, dtype]
    found = errors(partial(selective_scan, form="fused"), inputs, dtypes, direction=direction, padding_mask=mask)
    assert max(found) < (2e-5 if dtype == torch.float32 else 1e-2), found


def test_compiled_it_is_the_same():
    inputs = [x.float().requires_grad_() for x in operands(2, 60, 40, 16, device="cuda")]

    def double(*given):
        return 2 * selective_scan(*given)

    expected, found = double(*inputs), torch.compile(double, fullgraph=True)(*inputs)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(one, other)
