"""The block against its formulas, and the switch between forms."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.blocks import Block, MixerStack
from lba_exp.nn.softmax import SoftmaxAttention


class Stack(MixerStack):
    def __init__(self, *mixers):
        super().__init__()
        self.blocks = nn.ModuleList(Block(mixer, 8) for mixer in mixers)


class Recording(nn.Module):
    def forward(self, x, padding_mask):
        self.seen = x, padding_mask
        return 2 * x


def test_block_equals_its_formula_and_passes_the_mask():
    torch.manual_seed(0)
    block, x, mask = Block(Recording(), 8, mlp_ratio=1.5), torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    for norm in (block.mixer_norm, block.mlp_norm):
        nn.init.normal_(norm.weight)
    middle = x + 2 * F.layer_norm(x, (8,), block.mixer_norm.weight)
    up, down = block.mlp[0], block.mlp[2]
    assert up.out_features == 12
    expected = middle + F.linear(F.gelu(F.linear(block.mlp_norm(middle), up.weight, up.bias)), down.weight, down.bias)
    torch.testing.assert_close(block(x, mask), expected)
    assert block.mixer.seen[1] is mask


def test_dropout_acts_on_both_branches_in_training_alone():
    torch.manual_seed(1)
    block, x = Block(Recording(), 64, dropout=0.5), torch.randn(4, 16, 64)
    dropped = (block(x) == x).float().mean().item()  # both branches dropped: a quarter
    assert 0.2 < dropped < 0.3
    block.eval()
    assert torch.equal(block(x), block(x)) and not (block(x) == x).any()


def test_switching_forms_changes_linear_layers_alone_and_returns_the_form_before():
    stack = Stack(LinearAttention(8, 2), SoftmaxAttention(8, 2), LinearAttention(8, 2))
    assert stack.form == "parallel"
    assert stack.set_form("recurrent") == "parallel"
    assert [mixer.form for mixer in stack.mixers if mixer.forms] == ["recurrent", "recurrent"]
    assert stack.set_form("chunkwise") == "recurrent" and stack.form == "chunkwise"


def test_a_wrong_form_is_named_and_changes_nothing():
    stack = Stack(LinearAttention(8, 2))
    with pytest.raises(ValueError, match=r"form: got 'recurent', valid are 'parallel', .*; did you mean 'recurrent'"):
        stack.set_form("recurent")
    assert stack.form == "parallel"
    with pytest.raises(ValueError, match=r"form: got 'recurent', valid are"):
        Stack(SoftmaxAttention(8, 2)).set_form("recurent")


def test_switching_forms_does_nothing_to_a_model_without_linear_layers():
    stack, x = Stack(SoftmaxAttention(8, 2)), torch.randn(2, 3, 8)
    before = stack.run_blocks(x)
    assert stack.set_form("recurrent") is None and stack.set_form(None) is None
    assert torch.equal(stack.run_blocks(x), before)


def test_forms_and_state_size_over_layers():
    linear, softmax = LinearAttention(8, 2), SoftmaxAttention(8, 2)
    assert Stack(linear, LinearAttention(8, 4)).state_size == 2 * (2 * 4 * 4 + 2 * 4) + 2 * (4 * 2 * 2 + 4 * 2)
    assert Stack(linear, softmax).state_size is None
    assert Stack(softmax).forms == () and Stack(softmax).form is None
    assert Stack(softmax, linear).forms == linear.forms


def test_layers_that_differ_have_no_common_form():
    stack = Stack(LinearAttention(8, 2), LinearAttention(8, 2, form="recurrent"))
    assert stack.form is None


@pytest.mark.parametrize(("options", "message"), [({"mlp_ratio": 0.0}, "mlp_ratio: .* got 0.0"), ({"dropout": 1.0}, "dropout: .* got 1.0")])
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Block(nn.Identity(), 8, **options)
