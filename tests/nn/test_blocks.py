"""The block against its formulas, the switch between forms, compiled blocks."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.blocks import Block, CompiledBlocks, MixerStack, make_blocks, run_block
from lba_exp.nn.feedforward import DropPath
from lba_exp.nn.norms import BatchNorm
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


def test_the_fused_form_waits_for_a_gpu():
    # asked for before the weights are moved; compared by a parity check only where it runs
    stack = Stack(LinearAttention(8, 2, form="fused"), LinearAttention(8, 2))
    assert stack.set_form("fused") is None and stack.form == "fused" and "fused" not in stack.forms
    mixed = Stack(LinearAttention(8, 2, form="recurrent"), LinearAttention(8, 2, gate="selective_vector"))
    with pytest.raises(ValueError, match="form: got 'fused', valid are 'parallel', 'recurrent', 'chunkwise', 'auto'"):
        mixed.set_form("fused")
    assert [mixer.form for mixer in mixed.mixers] == ["recurrent", "parallel"]


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


def test_post_norm_equals_its_formula():
    torch.manual_seed(2)
    block, x = Block(Recording(), 8, norm_position="post", norm_eps=1e-3), torch.randn(2, 3, 8)
    middle = F.layer_norm(3 * x, (8,), eps=1e-3)
    torch.testing.assert_close(block(x), F.layer_norm(middle + block.mlp(middle), (8,), eps=1e-3))


def test_gated_mlps_equal_their_formulas():
    torch.manual_seed(3)
    x = torch.randn(2, 3, 8)
    block = Block(Recording(), 8, mlp="glu", mlp_ratio=2.0)
    middle = x + 2 * F.layer_norm(x, (8,))
    h = F.layer_norm(middle, (8,))
    weight, bias = block.mlp.up.weight, block.mlp.up.bias
    gated = F.gelu(F.linear(h, weight[:16], bias[:16])) * F.linear(h, weight[16:], bias[16:])
    torch.testing.assert_close(block(x), middle + block.mlp.down(gated))
    block = Block(Recording(), 8, mlp="output_glu")
    h, (weight, bias) = F.gelu(2 * F.layer_norm(x, (8,))), (block.after[2].weight, block.after[2].bias)
    expected = x + F.linear(h, weight[:8], bias[:8]) * torch.sigmoid(F.linear(h, weight[8:], bias[8:]))
    torch.testing.assert_close(block(x), expected)
    assert not hasattr(block, "mlp_norm")


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(4)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y, kept[:, None, None] * x / 0.75)
    assert 0.72 < kept.float().mean() < 0.78
    assert torch.equal(drop.eval()(x), x)
    rates = [block.drop_path.rate for block in make_blocks(lambda layer: Recording(), 8, 3, drop_path=0.2)]
    assert rates == [0.0, 0.1, 0.2]
    with pytest.raises(ValueError, match=r"drop_path: .* got 1.0"):
        DropPath(1.0)


def test_batch_norm_is_torchs_over_the_real_tokens():
    torch.manual_seed(5)
    ours, theirs = BatchNorm(4).double(), nn.BatchNorm1d(4).double()
    mask = torch.rand(3, 6) < 0.6
    for _ in range(3):
        x = 3 + 2 * torch.randn(3, 6, 4, dtype=torch.float64)
        y = ours(torch.where(mask[..., None], x, torch.full_like(x, 1e6)), mask)
        torch.testing.assert_close(y[mask], theirs(x[mask]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours(x), nn.BatchNorm1d(4).double()(x.flatten(0, 1)).view_as(x))
        theirs(x.flatten(0, 1))
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
    before = ours.running_mean.clone()
    assert ours(x, torch.zeros(3, 6, dtype=torch.bool)).isfinite().all() and torch.equal(ours.running_mean, before)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, mask), theirs(x.flatten(0, 1)).view_as(x))


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_checkpointing_changes_neither_gradients_nor_running_statistics(norm):
    torch.manual_seed(6)
    stack = Stack(LinearAttention(8, 2), SoftmaxAttention(8, 2))
    stack.blocks = make_blocks(lambda layer: stack.blocks[layer].mixer, 8, 2, norm=norm, dropout=0.3, drop_path=0.3)
    x, mask = torch.randn(3, 5, 8), torch.arange(5) < torch.tensor([[5], [3], [4]])
    results, state = [], {name: value.clone() for name, value in stack.state_dict().items()}
    calls = []
    stack.blocks[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        stack.load_state_dict(state)
        stack.zero_grad()
        stack.gradient_checkpointing = checkpointing
        torch.manual_seed(7)
        y = stack.run_blocks(x, mask)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in stack.parameters()), *(b.clone() for b in stack.buffers())])
    assert len(calls) == 3  # once, and once more in the backward pass
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("checkpointing", "form"), [(False, "parallel"), (True, "chunkwise"), (True, "recurrent")])
def test_compiled_blocks_compute_the_same_in_one_graph_for_all_that_are_alike(checkpointing, form, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(8)
    stack = Stack()
    stack.blocks = make_blocks(lambda layer: LinearAttention(8, 2, form=form, chunk_size=2), 8, 4, drop_path=0.3, norm="batch")
    stack.gradient_checkpointing = checkpointing
    compiled, x, mask = CompiledBlocks(stack), torch.randn(3, 5, 8), torch.arange(5) < torch.tensor([[5], [3], [4]])
    results, state, graphs = [], {name: value.clone() for name, value in stack.state_dict().items()}, torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for context in (nullcontext, compiled):
        stack.load_state_dict(state)
        stack.zero_grad()
        torch.manual_seed(9)
        with context():
            y = stack.run_blocks(x, mask)
            y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in stack.parameters()), *(b.clone() for b in stack.buffers())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    # of the first block, which is never left out, and of the others; again for what is computed twice
    assert graphs["unique_graphs"] - before == (4 if checkpointing else 2)
    assert stack.run_block is run_block
