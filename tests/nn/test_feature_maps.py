"""Feature maps against their formulas, evaluated with Python's math, and their gradients at extreme inputs."""

import math

import pytest
import torch

from lba_exp.registry import FEATURE_MAPS

ELEMENTWISE = {
    "identity": lambda x: x,
    "elu_plus_one": lambda x: x + 1 if x > 0 else math.exp(x),
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


def silu_normalised(row):
    shifted = [x / (1 + math.exp(-x)) + 0.5 for x in row]
    norm = math.sqrt(sum(s * s for s in shifted))
    return [s / norm for s in shifted]


def softmax(row):
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


FORMULAS = {
    **{name: lambda row, f=f: [f(x) for x in row] for name, f in ELEMENTWISE.items()},
    "silu_normalised": silu_normalised,
    "softmax": softmax,
}


def test_every_registered_map_has_a_formula_here():
    assert set(FORMULAS) == set(FEATURE_MAPS.names)


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_its_formula_over_the_last_dimension(name):
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 3, 5, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[name](row) for row in x.view(-1, 5).tolist()], dtype=torch.float64).view_as(x)
    torch.testing.assert_close(FEATURE_MAPS[name](x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_dtype_and_is_finite_at_extremes(name, dtype):
    x = torch.tensor([[0.0, 0.0, 0.0], [-1e30, 1e30, 0.0], [-1e4, -1e4, -1e4], [-1.278, -1.278, -1.278]], dtype=dtype, requires_grad=True)
    y = FEATURE_MAPS[name](x)
    assert y.dtype == dtype
    assert y.isfinite().all()
    y.square().sum().backward()
    if name != "identity":  # whose square overflows here
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "relu"])
def test_gradient_is_that_of_the_formula(name):
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(FEATURE_MAPS[name], x)


def test_elu_plus_one_keeps_small_values_in_half_precision():
    x = torch.tensor([-8.0], dtype=torch.bfloat16)
    assert FEATURE_MAPS["elu_plus_one"](x).item() == pytest.approx(math.exp(-8), rel=1e-2)
