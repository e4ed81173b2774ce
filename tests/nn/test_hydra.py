"""Gradients of Hydra against its quasiseparable matrix; what a token reads."""

import pytest
import torch

from lba_exp.nn.decay_groups import weight_decay_groups
from lba_exp.nn.hydra import Hydra, shifted
from tests.nn.test_mamba2 import gradients_agree, reads_one_side
from tests.nn.test_state_spaces import DIRECTIONS


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_of_every_form_are_the_dense_matrixs(direction):
    gradients_agree("hydra", direction)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_reads_nothing_of_the_other_side(direction):
    reads_one_side("hydra", direction)


def test_a_shift_moves_by_one_token_and_leaves_zeros():
    x = torch.arange(1.0, 5)[None, :, None]
    assert shifted(x, "forward").flatten().tolist() == [0, 1, 2, 3]
    assert shifted(x, "backward").flatten().tolist() == [2, 3, 4, 0]
    assert shifted(x[:, :1], "forward").tolist() == shifted(x[:, :1], "backward").tolist() == [[[0]]]


def test_one_token_alone_is_its_diagonal():
    """Nothing before it and nothing after: B, C, Delta and the decays do not matter."""
    torch.manual_seed(0)
    layer, u = Hydra(8, 2).double(), torch.randn(2, 1, 8, dtype=torch.float64)
    expected = layer(u)
    with torch.no_grad():
        layer.gate.bias.add_(3)
        layer.gate.log_rate.add_(1)
        layer.input.weight[32:].mul_(-2)  # B and C of both directions
    for form in layer.forms:
        layer.form = form
        torch.testing.assert_close(layer(u), expected)


def test_weight_decay_leaves_steps_and_rates_alone():
    layer = Hydra(8, 2)
    decayed = {id(p) for p in weight_decay_groups(layer, 0.1)[0]["params"]}
    names = [name for name, parameter in layer.named_parameters() if id(parameter) in decayed]
    assert names == ["input.weight", "convolution.convolution.weight", "diagonal.weight", "output.weight"]
