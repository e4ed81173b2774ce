"""Models whose sequences are cut into blocks, one a rank: outputs, losses and gradients are those of one device, in float64."""

import copy
import io

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F

from lba_exp.models.pretrained import create
from tests.ops.compare import error
from tests.ranks import on_ranks

LENGTH, BATCH = 13, 3
CUTS = {2: (0, 5, 13), 4: (0, 1, 6, 7, 13)}
SEQUENCE = {"kind": "sequence_classifier", "classes": 3, "channels": 2, "length": 20, "width": 8, "depth": 2, "heads": 2}
TEXT = {"vocabulary": 11, "length": 20, "width": 8, "depth": 2, "heads": 2, "dropout": 0.0}
VIT = {"kind": "vit", "classes": 3, "channels": 1, "image_size": [26, 6], "patch_size": 2, "width": 8, "depth": 2, "heads": 2}
LINEAR = {"kind": "linear", "form": "chunkwise", "chunk_size": 4}


def case(base, mixer=None, *, padded=True, **settings):
    return {**base, **settings, "mixer": {**LINEAR, **(mixer or {})}}, padded


CASES = {
    "mean, positions": case(SEQUENCE),
    "class token, open first gate": case(SEQUENCE, {"open_first": True, "form": "parallel"}, pooling="class_token"),
    "symmetric gate, no padding": case(SEQUENCE, {"convention": "symmetric"}, pooling="mean_all", padded=False),
    "divided before": case(SEQUENCE, {"scale": "before", "convention": "query", "norm": "group"}, positional_embedding=False),
    "divided before, forward, backward": case(SEQUENCE),
    "batch norm, checkpoints, drop path": case(
        SEQUENCE, {"gate": "fixed"}, norm="batch", gradient_checkpointing=True, drop_path=0.5, depth=3
    ),
    "hippo": case(SEQUENCE, {"gate": "selective_vector", "gate_init": "hippo", "diagonal": "twice"}, mlp="output_glu"),
    "above one": case(SEQUENCE, {"gate": "softplus_vector", "form": "parallel"}),
    "gated rfa": case(SEQUENCE, {"complement_keys": True, "scale": "none", "norm": "layer", "form": "recurrent"}, padded=False),
    "two towers": case({**SEQUENCE, "kind": "two_towers"}, pooling="class_token"),
    "image": case(VIT, {"gate": "fixed"}),
    "image, no padding": case(VIT, pooling="mean", padded=False),
    "image of any size": case(VIT, pooling="mean_all", positional_embedding=False),
    "masked text": case({"kind": "masked_lm", **TEXT}),
    "causal text": case({"kind": "causal_lm", **TEXT}, {"direction": "forward", "gate": "fixed_vector"}, padded=False),
    "class of a text": case({"kind": "text_classifier", "classes": 3, **TEXT}),
}
CASES["divided before, forward, backward"][0]["mixer"] = [
    {**LINEAR, "scale": "before", "direction": "alternating", "layer": layer} for layer in range(2)
]


def batch_of(config, padded):
    """A batch of whole sequences; the last sequence's real tokens are two of a middle rank's, or a few at the end."""
    generator = torch.Generator().manual_seed(0)
    kind, pair = config["kind"], (2,) if config["kind"] == "two_towers" else ()
    mask = torch.rand(BATCH, *pair, LENGTH, generator=generator) > 0.2
    mask[-1, ..., :10], mask[-1, ..., 10:] = False, True
    batch = {"labels": torch.randint(3, (BATCH,), generator=generator)}
    if kind == "vit":
        batch["inputs"] = torch.rand(BATCH, 1, 2 * LENGTH, 6, generator=generator, dtype=torch.float64)
        mask = mask.repeat_interleave(3, dim=1)
    elif kind in ("masked_lm", "causal_lm", "text_classifier"):
        batch["inputs"] = torch.randint(11, (BATCH, LENGTH), generator=generator)
        if kind != "causal_lm":
            batch["token_types"] = torch.randint(2, (BATCH, LENGTH), generator=generator)
        if kind != "text_classifier":
            batch["labels"] = torch.randint(11, (BATCH, LENGTH), generator=generator)
            batch["labels"][:, 1:6] = -100  # no target on one of four ranks
    else:
        batch["inputs"] = torch.rand(BATCH, *pair, LENGTH, 2, generator=generator, dtype=torch.float64)
    return batch | ({"padding_mask": mask} if padded else {})


def block(config, batch, start, stop):
    """This rank's part, cut by hand: blocks of any length."""
    if config["kind"] == "vit":
        part = batch | {"inputs": batch["inputs"][:, :, 2 * start : 2 * stop]}
        return part | ({"padding_mask": batch["padding_mask"][:, 3 * start : 3 * stop]} if "padding_mask" in batch else {})
    dim = 2 if config["kind"] == "two_towers" else 1
    return {k: v if v.ndim <= dim else v.narrow(dim, start, stop - start) for k, v in batch.items()}


def outputs(model, batch, targets):
    """Logits, and this device's share of the loss: of the classes a rank's share is all of it, of tokens its own."""
    further = {k: batch[k] for k in ("padding_mask", "token_types") if k in batch}
    if batch["labels"].ndim == 1:
        logits = model(batch["inputs"], **further)
        return logits, F.cross_entropy(logits, batch["labels"])
    selected = batch["labels"] != -100
    logits = model(batch["inputs"], **further, selected=selected)
    return logits, F.cross_entropy(logits, batch["labels"][selected], reduction="sum") / targets


def worst_error(config, padded, group, cuts, device="cpu"):
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    model = create(config).double().to(device)
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros, no ones
            parameter += 0.1 * torch.randn_like(parameter)
    batch = {name: value.to(device) for name, value in batch_of(config, padded).items()}
    tokens, targets = batch["labels"].ndim > 1, int((batch["labels"] != -100).sum())
    split = copy.deepcopy(model)
    torch.manual_seed(7)
    logits, loss = outputs(model, batch, targets)
    loss.backward()

    split.set_sequence_group(group)
    torch.manual_seed(7 + rank)  # a sample's tokens skip a branch together, whatever each rank draws
    even = split.share(batch, rank, ranks)
    own = block(config, batch, *cuts[rank : rank + 2])
    if cuts == tuple(LENGTH * n // ranks for n in range(ranks + 1)):
        assert all(torch.equal(even[k], own[k]) for k in batch)
    found, share = outputs(split, own, targets)
    share.backward()
    if tokens:
        places = torch.arange(LENGTH, device=device).expand(BATCH, -1)[batch["labels"] != -100]
        logits = logits[(places >= cuts[rank]) & (places < cuts[rank + 1])]
    whole_loss = share.detach().clone()
    dist.all_reduce(whole_loss, group=group)
    errors = [error(found, logits), error(whole_loss if tokens else share, loss)]
    for x, y in zip(split.parameters(), model.parameters(), strict=True):
        grad = x.grad.clone()
        dist.all_reduce(grad, group=group)
        errors.append(error(grad if tokens else grad / ranks, y.grad, torch.tensor(1e-3)))
    for x, y in zip(split.buffers(), model.buffers(), strict=True):
        errors.append(error(x, y))
    split.set_sequence_group(None)
    assert torch.equal(split.eval()(batch["inputs"]), split(batch["inputs"]))  # whole again: nobody else is asked
    return torch.tensor(errors).max().item()  # NaN stays NaN


def process(rank):
    groups = {2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    found = {}
    for ranks, group in groups.items():
        if rank < ranks:
            for name, (config, padded) in CASES.items():
                found[f"{ranks} {name}"] = worst_error(config, padded, group, CUTS[ranks])
    for name, mixer in (("softmax", {"kind": "softmax"}), ("snake", {**LINEAR, "scan": "snake", "grid": [2, 5]})):
        model = create({**SEQUENCE, "mixer": [LINEAR, mixer]})
        with pytest.raises(ValueError) as refused:
            model.set_sequence_group(dist.group.WORLD)
        assert model.sequence_ranks is None and model.mixers[0].sequence_ranks is None
        found[name] = str(refused.value)
    model = create({**SEQUENCE, "mixer": LINEAR, "length": 7})
    model.set_sequence_group(dist.group.WORLD)
    with pytest.raises(ValueError, match="at most 7 tokens, the positional embedding's length, got 8"):
        model(torch.rand(1, 2, 2))
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    assert torch.load(kept, weights_only=False).mixers[0].sequence_ranks is None
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return on_ranks(process, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("ranks", CUTS)
@pytest.mark.parametrize("name", CASES)
def test_a_split_model_is_the_model_on_one_device(answers, ranks, name):
    for answer in answers[:ranks]:
        assert answer[f"{ranks} {name}"] <= 1e-10


def test_layers_that_need_the_whole_sequence_are_named(answers):
    for answer in answers:
        assert "got SoftmaxAttention in layer 1" in answer["softmax"] and "scan='snake' reads" in answer["snake"]
