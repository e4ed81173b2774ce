"""Softmax attention against the formula, and its padding."""

import pytest
import torch

from lba_exp.nn.softmax import SoftmaxAttention


def definition(layer, x):
    width, heads = x.shape[-1], layer.heads
    q, k, v = ((x @ w.T + b).view(len(x), heads, -1) for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True))
    heads_out = [torch.softmax(q[:, h] @ k[:, h].T / (width // heads) ** 0.5, -1) @ v[:, h] for h in range(heads)]
    return torch.cat(heads_out, -1) @ layer.output.weight.T + layer.output.bias


@pytest.mark.parametrize(("heads", "length"), [(2, 6), (1, 1)])
def test_equals_the_formula(heads, length):
    torch.manual_seed(0)
    layer, x = SoftmaxAttention(8, heads).double(), torch.randn(2, length, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.stack([definition(layer, row) for row in x]), rtol=1e-10, atol=1e-10)


def test_padded_keys_are_left_out():
    torch.manual_seed(1)
    layer, x = SoftmaxAttention(8, 2).double(), torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1]], dtype=torch.bool)
    y = layer(x, mask)
    for row in range(2):
        torch.testing.assert_close(y[row][mask[row]], definition(layer, x[row][mask[row]]), rtol=1e-10, atol=1e-10)


def test_a_sequence_of_padding_alone_has_finite_outputs_and_gradients():
    layer, x = SoftmaxAttention(8, 2), torch.randn(2, 4, 8, requires_grad=True)
    mask = torch.tensor([[False] * 4, [True] * 4])
    y = layer(x, mask)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    torch.testing.assert_close(y, layer(x))  # it attends to all of its tokens, the other to its own


def test_has_no_forms_and_no_state_size():
    assert SoftmaxAttention(8, 2).forms == () and SoftmaxAttention(8, 2).state_size is None


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(4, dtype=torch.bool)])
def test_a_wrong_mask_is_named(mask):
    with pytest.raises(ValueError, match=r"padding_mask: expected torch.bool of shape \(2, 4\)"):
        SoftmaxAttention(8, 2)(torch.randn(2, 4, 8), mask)


@pytest.mark.parametrize("direction", ["forward", "backward", "alternating"])
def test_one_direction_sees_the_tokens_on_one_side(direction):
    torch.manual_seed(2)
    layer, x = SoftmaxAttention(8, 2, direction=direction, layer=1).double(), torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0]], dtype=torch.bool)
    plain, masked = layer(x), layer(x, mask)
    assert masked.isfinite().all()
    for i in range(6):
        side = slice(0, i + 1) if direction == "forward" else slice(i, 6)  # layer 1 of alternating reads backward
        at = i if direction == "forward" else 0
        torch.testing.assert_close(plain[0, i], definition(layer, x[0, side])[at], rtol=1e-10, atol=1e-10)
        if mask[1, i]:
            seen = x[1, side][mask[1, side]]
            torch.testing.assert_close(masked[1, i], definition(layer, seen)[-1 if direction == "forward" else 0], rtol=1e-10, atol=1e-10)


def test_a_feature_map_acts_on_queries_and_keys():
    torch.manual_seed(3)
    layer, x = SoftmaxAttention(8, 2, feature_map="sigmoid").double(), torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = ((x[0] @ w.T + b).view(5, 2, 4) for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True))
    y = [torch.softmax(q[:, h].sigmoid() @ k[:, h].sigmoid().T / 2, -1) @ v[:, h] for h in range(2)]
    torch.testing.assert_close(layer(x)[0], torch.cat(y, -1) @ layer.output.weight.T + layer.output.bias, rtol=1e-10, atol=1e-10)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"heads: .* got 3"):
        SoftmaxAttention(8, 3)
