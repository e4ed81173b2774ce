"""Which parameters are exempt from weight decay."""

import pytest
import torch
from torch import nn

from lba_exp.models.classifier import SequenceClassifier
from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.decay_groups import weight_decay_groups


def build(gate, **options):
    return SequenceClassifier(
        make_mixer=lambda layer: LinearAttention(8, 2, gate=gate), classes=3, width=8, depth=2, channels=1, length=6, **options
    )


@pytest.mark.parametrize("gate", ["none", "fixed", "selective"])
def test_only_weight_matrices_decay(gate):
    model = build(gate, pooling="class_token")
    decayed, undecayed = weight_decay_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and undecayed["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {"embedding.weight", "head.weight"}
    for layer in range(2):
        matrices |= {f"blocks.{layer}.{part}.weight" for part in ("mixer.qkv", "mixer.output", "mlp.0", "mlp.2")}
    assert {names[id(p)] for p in decayed["params"]} == matrices
    exempt = {names[id(p)] for p in undecayed["params"]}
    assert exempt == set(names.values()) - matrices
    assert {"positions.weight", "class_token.weight", "norm.weight", "norm.bias"} <= exempt
    gates = {name for name in names.values() if ".gate." in name}
    assert len(gates) == {"none": 0, "fixed": 2, "selective": 4}[gate] and gates <= exempt


def test_no_parameter_is_missing_or_listed_twice():
    model = build("selective")
    model.head.weight = nn.Parameter(torch.zeros(3, 8))
    model.blocks[1].mlp = model.blocks[0].mlp  # shared
    model.blocks[0].mixer.output.weight = model.blocks[0].mixer.gate.projection.weight  # in a gate and outside one
    listed = [id(p) for group in weight_decay_groups(model, 0.1) for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}
    assert id(model.blocks[0].mixer.output.weight) in {id(p) for p in weight_decay_groups(model, 0.1)[1]["params"]}


def test_a_gate_of_a_plugin_is_exempt_by_its_base():
    from lba_exp.nn.gates import Gate

    class Theirs(Gate):
        def __init__(self):
            super().__init__(4, 2)
            self.inner = nn.Sequential(nn.Linear(4, 4, bias=False))

    assert weight_decay_groups(Theirs(), 0.1)[0]["params"] == []


def test_the_optimizer_takes_the_groups():
    model = build("fixed")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {name for (name, p), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, old)}
    assert moved and not any("gate" in name or "norm" in name or "positions" in name or name.endswith("bias") for name in moved)


def test_a_negative_weight_decay_is_refused():
    with pytest.raises(ValueError, match=r"weight_decay: .* got -1"):
        weight_decay_groups(build("none"), -1)
