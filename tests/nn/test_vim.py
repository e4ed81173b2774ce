"""Gradients of Vision Mamba's mixer against its dense matrices; how its scans start, and what is in at least float32."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lba_exp.nn.decay_groups import weight_decay_groups
from lba_exp.nn.vim import Rates, Vim
from tests.nn.test_mamba2 import gradients_agree, reads_one_side
from tests.nn.test_state_spaces import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_of_every_form_are_the_dense_matrixs(direction):
    gradients_agree("vim", direction)


def test_scans_start_as_published():
    torch.manual_seed(0)
    layer = Vim(40, 4)
    for scan in layer.scans:
        torch.testing.assert_close(scan.rates(), -torch.arange(1.0, 17).repeat(80, 1))
        steps = F.softplus(scan.steps.bias)
        assert steps.min() >= 0.99e-3 and steps.max() <= 0.1001 and steps.max() > 10 * steps.min()
        assert scan.steps.in_features == 3  # 40 / 16, rounded up
        assert scan.convolution.margins == ((3, 0) if scan.direction == "forward" else (0, 3))


def test_parameters_are_what_the_preset_says():
    for width in (32, 192):
        assert sum(p.numel() for p in Vim(width, 2).parameters()) == 6.5 * width**2 + 220 * width


def test_steps_and_rates_are_float32_under_autocast_and_with_half_precision_weights():
    torch.manual_seed(0)
    layer, u = Vim(32, 4), torch.randn(2, 9, 32)
    inside, low = layer.input(u)[..., :64], []
    for scan in layer.scans:
        scan.input.register_forward_hook(lambda module, args, output: low.append(output[..., :2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calls = [scan.operands(inside, None) for scan in layer.scans]
    for scan, call, steps in zip(layer.scans, calls, low, strict=True):
        assert call["delta"].dtype == call["a"].dtype == torch.float32
        # only the low-rank products before it are rounded
        torch.testing.assert_close(
            call["delta"], F.softplus(F.linear(steps.float(), scan.steps.weight, scan.steps.bias)), rtol=1e-6, atol=0
        )
    half = Rates(3, 16).bfloat16()
    assert half().dtype == torch.float32
    torch.testing.assert_close(half().double(), copy.deepcopy(half).double()(), rtol=1e-6, atol=0)


def test_weight_decay_leaves_rates_and_biases_of_steps_alone():
    layer = Vim(8, 2, direction="forward")
    decayed = {id(p) for p in weight_decay_groups(layer, 0.1)[0]["params"]}
    names = [name for name, parameter in layer.named_parameters() if id(parameter) in decayed]
    weights = ["convolution.convolution", "input", "steps"]
    assert names == ["input.weight", *(f"scans.0.{name}.weight" for name in weights), "output.weight"]


def test_a_call_is_seen_as_a_head_for_each_channel():
    layer = Vim(8, 2, state=3)
    first, second = layer.operands(torch.randn(5, 7, 8))
    assert layer.call_shape(first) == layer.call_shape(second) == (5, 7, 16, 3, 1)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_reads_nothing_of_the_other_side(direction):
    reads_one_side("vim", direction)
