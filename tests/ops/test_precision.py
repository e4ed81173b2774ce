"""Dtypes and autocast, long sequences, memory in training."""

import math

import pytest
import torch

from lba_exp.ops import bidirectional_linear_attention, bidirectional_linear_attention_parts, step_log_decays

from .compare import FORMS, Case, error

MODEL_FORMS = ("parallel", "recurrent", "chunkwise")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_accumulates_in_float32(form, dtype):
    # 500 equal terms: sums kept in half precision would be far off, and the numerator exceeds float16
    q, k = (torch.full((1, 500, 1, 8), 16.0, dtype=dtype) for _ in range(2))
    v = torch.full((1, 500, 1, 4), 3.0, dtype=dtype)
    y = bidirectional_linear_attention(q, k, v, form=form)
    assert y.dtype == dtype and torch.equal(y, v)
    num, den = bidirectional_linear_attention_parts(q, k, v, form=form)
    assert num.dtype == den.dtype == torch.float32
    assert error(num, torch.full_like(num, 3 * 500 * 2048.0)) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_mixed_dtypes_give_the_dtype_of_v(form):
    *tensors, mask = Case(padded="holes").tensors()
    q, k, v, f, b = tensors
    y = bidirectional_linear_attention(q.bfloat16(), k, v.half(), f, b, form=form, padding_mask=mask)
    assert y.dtype == torch.float16
    inputs = [x.clone().requires_grad_() for x in (q.bfloat16(), k, v.half(), f, b)]
    grads = torch.autograd.grad(bidirectional_linear_attention(*inputs, form=form).float().sum(), inputs)
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form):
    *tensors, mask = Case(padded="holes").tensors()
    results = []
    for enabled in (False, True):
        inputs = [x.clone().requires_grad_() for x in tensors]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = bidirectional_linear_attention(*inputs, form=form, padding_mask=mask, chunk_size=8)
            # custom backward passes hold against a caller's autocast, too; plain PyTorch's do not
            inside = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) if form in ("recurrent", "chunkwise") else ()
        grads = torch.autograd.grad(y.square().sum(), inputs)
        assert y.dtype == torch.float32
        results.append([y, *grads, *inside])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["selective", "selective_vector"])
@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_training_keeps_no_states(form, kind):
    q, k, v, f, b, _ = Case(kinds=(kind, kind), length=256, key_width=16, value_width=16).tensors()
    inputs = [x.requires_grad_() for x in (q, k, v, f, b)]
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = bidirectional_linear_attention(*inputs, form=form, chunk_size=16)
    size = sum(x.numel() * x.element_size() for x in (*inputs, y))
    assert sum(kept.values()) <= 1.1 * size


def plain_recurrence(q, k, v, f, b):
    """num and den of one head in float64, one token after the other, written apart from the forms: ``(L, Dv + 1)``."""
    v = torch.cat([v, torch.ones_like(v[:, :1])], dim=1)
    out = (q * k).sum(1, keepdim=True) * v
    for order, decay in ((range(len(q)), f), (range(len(q) - 1, -1, -1), b)):
        state = torch.zeros(q.shape[1], v.shape[1], dtype=torch.float64)
        for t in order:
            state.mul_(decay[t])
            out[t] += q[t] @ state
            state.addr_(k[t], v[t])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.0, -1e-5, -1e-3, "selective"])
@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_error_at_65536(form, level):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 65536, 1, 8, generator=generator) for _ in range(3))
    gate = torch.full((1, 65536, 1), level) if level != "selective" else -(torch.rand(1, 65536, 1, generator=generator) ** 4)
    f, b = step_log_decays(gate)
    y = bidirectional_linear_attention(q, k, v, f, b, form=form)
    exact = plain_recurrence(*(x[0, :, 0].double() for x in (q, k, v)), f[0, :, 0].double().exp(), b[0, :, 0].double().exp())
    assert error(y[0, :, 0], exact[:, :-1] / (exact[:, -1:] + 1e-6)) <= 1e-4
    num, den = bidirectional_linear_attention_parts(q, k, v, f, b, form=form)
    assert error(num[0, :, 0], exact[:, :-1]) <= 1e-4 and error(den[0, :, 0], exact[:, -1]) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fixed", "selective", "selective_vector"])
@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_gradients_at_65536(form, kind):
    # float64 of the same form, which the short cases hold to direct summation
    tensors = Case(kinds=(kind, kind), level="slow", length=65536, batch=1, heads=2, key_width=8, value_width=8).tensors()[:5]
    results = []
    for double in (False, True):
        inputs = [(x.double() if double else x).clone().requires_grad_() for x in tensors]
        y = bidirectional_linear_attention(*inputs, form=form if not double else "chunkwise")
        results.append(torch.autograd.grad((y.double() * tensors[2].double()).sum(), inputs))
    for one, other in zip(*results, strict=True):
        assert error(one, other) <= 1e-4


@pytest.mark.parametrize("form", MODEL_FORMS)
def test_saturated_gates(form):
    # float32 sums of these log decays would leave nothing of the small one
    gate = torch.full((1, 784, 1), -1e4)
    gate[:, 700] = -0.5
    f, b = step_log_decays(gate, "query")
    ones = torch.ones(1, 784, 1, 1)
    num, _ = bidirectional_linear_attention_parts(ones, ones, ones, f, b, form=form)
    expected = torch.ones(784)
    expected[700] = 1 + 2 * math.exp(-0.5)
    assert error(num[0, :, 0, 0], expected) <= 1e-7
