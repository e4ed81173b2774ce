"""The decays on record are those that the operator gets."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lba_exp.callbacks.decays import QUANTILES, SEQUENCES, Decays, decay_quantiles
from lba_exp.models.classifier import SequenceClassifier
from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.softmax import SoftmaxAttention


def model(make_mixer, depth=2):
    torch.manual_seed(0)
    return SequenceClassifier(make_mixer=make_mixer, classes=3, width=8, depth=depth, channels=1, length=11)


def batch(samples=5, padded=False):
    inputs = torch.randn(samples, 11, 1, generator=torch.Generator().manual_seed(1))
    if not padded:
        return {"inputs": inputs}
    mask = torch.arange(11)[None] < torch.tensor([11, 7, 3, 9, 5])[:samples, None]
    return {"inputs": inputs, "padding_mask": mask}


@pytest.mark.parametrize("padded", [False, True])
def test_selective_decays_by_layer_and_head(padded):
    net = model(lambda layer: LinearAttention(8, 2, gate="selective", gate_init="random", convention="query"))
    data, gates = batch(padded=padded), []
    handles = [m.gate.register_forward_hook(lambda module, args, out: gates.append(out.double().detach())) for m in net.mixers]
    found = decay_quantiles(net, data)
    for handle in handles:
        handle.remove()
    assert found["quantiles"] == list(QUANTILES) and found["sequences"] == 5
    assert [layer["layer"] for layer in found["layers"]] == ["blocks.0.mixer", "blocks.1.mixer"]
    mask = data.get("padding_mask", torch.ones(5, 11, dtype=torch.bool))
    # each layer's gate runs twice: in the hook, and in the layer itself
    for layer, gate in zip(found["layers"], gates[::2], strict=True):
        for direction, kept in (("forward", slice(1, None)), ("backward", slice(None, -1))):
            for head in range(2):
                values = gate[:, kept, head][mask[:, kept]].numpy()  # the decay at the edge never enters
                assert layer[direction][head] == pytest.approx(np.quantile(values, QUANTILES), rel=1e-9)


def test_fixed_and_absent_decays():
    net = model(lambda layer: LinearAttention(8, 2, gate="fixed" if layer else "none"))
    first, second = decay_quantiles(net, batch())["layers"]
    assert first["forward"] is None and first["backward"] is None
    expected = torch.nn.functional.logsigmoid(net.mixers[1].gate.logit.detach().double())
    for head in range(2):
        assert second["forward"][head] == pytest.approx([float(expected[head])] * 5, rel=1e-6)


def test_vector_decays_are_counted_over_channels():
    class Vector(nn.Module):
        def operands(self, x, padding_mask=None):
            decay = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
            return {"forward_log_decay": decay, "backward_log_decay": decay.expand(*x.shape[:2], 2, 3)}

        def forward(self, x, padding_mask=None):
            self.operands(x, padding_mask)
            return x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Vector()

        def forward(self, inputs, padding_mask=None):
            return self.layer(inputs, padding_mask)

    (layer,) = decay_quantiles(Net(), batch())["layers"]
    for direction in ("forward", "backward"):
        assert [head[2] for head in layer[direction]] == [-2.0, -5.0] and layer[direction][0][4] == pytest.approx(-1.1, abs=0.11)


def test_a_model_without_linear_layers_has_none_on_record():
    assert decay_quantiles(model(lambda layer: SoftmaxAttention(8, 2)), batch()) is None


def test_the_callback_takes_the_first_test_batch_and_leaves_the_model_alone():
    from contextlib import nullcontext

    net = model(lambda layer: LinearAttention(8, 2)).train()
    state = torch.get_rng_state()
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=nullcontext))
    callback = Decays()
    assert callback.record() is None
    many = {"inputs": torch.randn(SEQUENCES + 3, 11, 1, generator=torch.Generator().manual_seed(2))}
    callback.on_test_batch_start(trainer, SimpleNamespace(model=net), many, 0)
    record = callback.record()
    callback.on_test_batch_start(trainer, SimpleNamespace(model=net), batch(), 1)
    assert callback.record() is record and record["sequences"] == SEQUENCES
    assert net.training and torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in net.parameters())
    assert not any(m._forward_pre_hooks for m in net.modules())
