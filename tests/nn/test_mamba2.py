"""Gradients of Mamba-2 against its dense matrix, and the steps and decays that it shares with Hydra."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from lba_exp.nn.decay_groups import weight_decay_groups
from lba_exp.nn.mamba2 import Mamba2
from lba_exp.nn.state_space import StepSizes, step_biases
from tests.nn.test_state_spaces import DENSE, DIRECTIONS, make


def gradients_agree(kind, direction):
    """Gradients of the input and of every parameter, in every form, are those of the dense matrix."""
    layer, u = make(kind, direction=direction)
    inputs = [u.requires_grad_(), *layer.parameters()]
    weights = torch.randn_like(u)
    expected = torch.autograd.grad((DENSE[kind](layer, u) * weights).sum(), inputs)
    for form in layer.forms:
        layer.form = form
        found = torch.autograd.grad((layer(u) * weights).sum(), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def reads_one_side(kind, direction):
    """A token changes nothing before itself, as the direction reads, in any form, and changes its own output."""
    layer, u = make(kind, direction=direction)
    other = u.clone()
    other[:, 4] += 1
    unread = slice(0, 4) if direction == "forward" else slice(5, None)
    for form in layer.forms:
        layer.form = form
        changed = ((layer(u) - layer(other)) != 0).any(-1)
        assert not changed[:, unread].any() and changed[:, 4].all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_of_every_form_are_the_dense_matrixs(direction):
    gradients_agree("mamba2", direction)


def test_steps_and_rates_start_as_published():
    torch.manual_seed(0)
    steps = F.softplus(step_biases(4000))
    assert 1e-3 <= steps.min() < 1.05e-3 and 0.095 < steps.max() <= 0.1001
    # log-uniform: as many below as above the geometric mean
    assert abs((steps < 1e-2).float().mean() - 0.5) < 0.03
    rates = StepSizes(4, 4000).log_rate.exp()
    assert 1 <= rates.min() < 1.05 and 15.9 < rates.max() <= 16.001
    assert abs(rates.mean() - 8.5) < 0.3


@pytest.mark.parametrize("directions", [1, 2])
def test_decays_are_float32_under_autocast_and_with_half_precision_weights(directions):
    torch.manual_seed(0)
    steps, u = StepSizes(64, 4, directions), torch.randn(2, 9, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = steps(u)
    torch.testing.assert_close(inside, steps(u), rtol=0, atol=0)
    steps, u = steps.bfloat16(), u.bfloat16()
    exact = copy.deepcopy(steps).double()(u.double())
    for found, expected in zip(steps(u), exact, strict=True):
        for own, reference in zip(found, expected, strict=True):
            assert own.dtype == torch.float32
            torch.testing.assert_close(own.double(), reference, rtol=1e-5, atol=0)


def test_weight_decay_leaves_steps_and_rates_alone():
    layer = Mamba2(8, 2)
    decayed = {id(p) for p in weight_decay_groups(layer, 0.1)[0]["params"]}
    names = [name for name, parameter in layer.named_parameters() if id(parameter) in decayed]
    assert names == ["input.weight", "convolution.convolution.weight", "output.weight"]


def test_the_decay_is_the_exponential_of_the_step_times_its_rate():
    steps, u = StepSizes(6, 3).double(), torch.randn(1, 4, 6, dtype=torch.float64)
    ((delta, log_decay),) = steps(u)
    for token in range(4):
        for head in range(3):
            raw = (steps.projection.weight[head] @ u[0, token] + steps.bias[head]).item()
            assert delta[0, token, head].item() == pytest.approx(math.log1p(math.exp(raw)))
            expected = -math.log1p(math.exp(raw)) * math.exp(steps.log_rate[head].item())
            assert log_decay[0, token, head].item() == pytest.approx(expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_reads_nothing_of_the_other_side(direction):
    reads_one_side("mamba2", direction)
