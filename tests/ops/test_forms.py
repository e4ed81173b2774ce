"""Every form against direct summation."""

import itertools

import pytest
import torch

from lba_exp.ops import MODEL_FORMS, bidirectional_linear_attention

from . import reference


@pytest.mark.parametrize("form", MODEL_FORMS)
@pytest.mark.parametrize("kinds", list(itertools.product("nfs", "nfs")), ids="".join)
def test_outputs(form, kinds):
    torch.manual_seed(0)
    batch, length, heads = 2, 37, 3
    q, k = (torch.rand(batch, length, heads, 4) for _ in range(2))
    v = torch.randn(batch, length, heads, 5)
    shapes = {"n": None, "f": (heads,), "s": (batch, length, heads)}
    f, b = (None if shapes[kind] is None else -torch.rand(shapes[kind]) for kind in kinds)
    mask = torch.rand(batch, length) > 0.2
    y = bidirectional_linear_attention(q, k, v, f, b, form=form, chunk_size=8, padding_mask=mask)
    expected = reference.attention(q, k, v, f, b, padding_mask=mask)
    assert (y - expected).norm() <= 2e-5 * expected.norm()
