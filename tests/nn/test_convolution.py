"""The convolution over tokens against its sum, and what it does at padding."""

import pytest
import torch

from lba_exp.nn.convolution import TokenConvolution


@pytest.mark.parametrize(("direction", "width", "first"), [("both", 5, -2), ("forward", 4, -3), ("backward", 4, 0), ("both", 1, 0)])
def test_each_channel_is_a_sum_over_neighbours(direction, width, first):
    layer, x = TokenConvolution(3, width, direction).double(), torch.randn(2, 7, 3, dtype=torch.float64)
    weight, bias = layer.convolution.weight[:, 0], layer.convolution.bias
    expected = torch.zeros_like(x) + bias
    for i in range(7):
        for offset in range(width):
            if 0 <= i + first + offset < 7:
                expected[:, i] += weight[:, offset] * x[:, i + first + offset]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
def test_padding_at_either_end_is_cutting_it_off(direction):
    layer, x = TokenConvolution(3, 3, direction), torch.randn(1, 9, 3)
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[:, 2:7] = True
    x[:, :2] = x[:, 7:] = float("nan")
    torch.testing.assert_close(layer(x, mask)[:, 2:7], layer(x[:, 2:7]))


def test_mistakes_name_the_argument():
    with pytest.raises(ValueError, match="convolution: expected an odd number of tokens for direction='both', got 4"):
        TokenConvolution(3, 4)
    with pytest.raises(ValueError, match="width: "):
        TokenConvolution(3, 0, "forward")
    with pytest.raises(ValueError, match="direction: "):
        TokenConvolution(3, 3, "left")


@pytest.mark.parametrize("direction", ["both", "forward", "backward"])
def test_it_compiles_as_one_graph_and_takes_autocast(direction):
    torch.manual_seed(0)
    layer, x = TokenConvolution(3, 3, direction), torch.randn(2, 6, 3)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, mask), layer(x, mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x, mask)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), layer(x, mask), rtol=0.02, atol=0.02)
