"""An independent judge: the naive references of flash-linear-attention, which are causal, unscaled and follow the convention ``query``."""

import math
import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says that there is no GPU
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.retention.naive import naive_retention
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

from lba_exp.ops import bidirectional_linear_attention, step_log_decays

from .compare import FORMS, error


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 67, 4, width, generator=generator) for width in (16, 16, 24))
    gate = -torch.rand(2, 67, 4, 16, generator=generator)
    return q, k, v, gate


def causal(form, q, k, v, gate):
    decay, _ = step_log_decays(gate, "query")
    return bidirectional_linear_attention(q, k, v, decay, scaled=False, direction="forward", form=form, chunk_size=16)


def judge(ours, theirs, inputs):
    """The output and every gradient agree to single precision."""
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) - 0.5
        results.append([y, *torch.autograd.grad((y * weights).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert error(one, other) <= 2e-5


@pytest.mark.parametrize("form", FORMS)
def test_simple_gla(form, tensors):
    q, k, v, gate = tensors
    inputs = (q, k, v, gate[..., 0])
    judge(lambda *x: causal(form, *x), lambda q, k, v, g: naive_recurrent_simple_gla(q, k, v, g, scale=1.0)[0], inputs)


@pytest.mark.parametrize("form", FORMS)
def test_gla(form, tensors):
    # it multiplies q by Dk^-0.5 and has no argument for it
    judge(lambda *x: causal(form, *x), lambda q, k, v, g: naive_recurrent_gla(q * math.sqrt(16), k, v, g)[0], tensors)


@pytest.mark.parametrize("form", FORMS)
def test_linear_attention(form, tensors):
    judge(
        lambda q, k, v: causal(form, q, k, v, None),
        lambda q, k, v: naive_recurrent_linear_attn(q, k, v, scale=1.0, normalize=False)[0],
        tensors[:3],
    )


@pytest.mark.parametrize("form", FORMS)
def test_retention(form, tensors):
    # fixed decays 1 - 2^(-5-h); tensors as (B, H, L, D)
    gate = torch.log1p(-torch.exp2(-5.0 - torch.arange(4, dtype=torch.float64))).float()

    def theirs(q, k, v):
        return naive_retention(*(x.transpose(1, 2) for x in (q * math.sqrt(16), k, v))).transpose(1, 2)

    judge(lambda q, k, v: causal(form, q, k, v, gate), theirs, tensors[:3])
