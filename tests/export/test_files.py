"""Exported files, run as anyone would run them, against the models they were made from.

Tracing takes seconds a layer: one whole model and one step run here; the other mixers, forms and inputs are slow.
"""

from functools import partial as later

import pytest
import torch

from lba_exp.errors import UserError
from lba_exp.export import export, read_metadata
from lba_exp.ops import bidirectional_linear_attention_parts, streaming

from . import models

slow = pytest.mark.slow


def different(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def load(path):
    program = torch.export.load(path)
    operations = {str(node.target).split(".")[0] for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert operations == {"aten"}, "a file needs nothing but torch"
    return program.module()


def inputs(model, batch, length, *, mask=False, types=False, seed=0):
    torch.manual_seed(seed)
    if hasattr(model, "image_size"):
        shape, first = (batch, 6), torch.randn(batch, model.channels, *model.image_size)
    elif type(model).__name__ == "TwoTowers":
        shape = (batch, 2, length)
        first = torch.randint(20, shape)
    else:
        shape = (batch, length)
        first = torch.randint(20, shape) if getattr(model, "channels", None) is None else torch.randn(*shape, model.channels)
    given = [first]
    if mask:
        given.append(torch.rand(shape) > 0.3)
        if first.is_floating_point() and len(shape) + 1 == first.ndim:
            first[~given[1]] = torch.nan  # what stands at padding never matters
    if types:
        given.append(torch.randint(2, shape))
    return given


SCANS = models.mixer("s", scan="multi", grid=[2, 3], class_token=True)
TOWERS = {"kind": "two_towers", "channels": None, "vocabulary": 20}
GROWING = models.mixer("s", gate="softplus_vector")
BEFORE = models.mixer("s", direction="forward", scale="before")
SYMMETRIC = models.mixer("symmetric", direction="forward", diagonal="once")
LENGTHS = (1, 8, 64)  # a token, a chunk, as many as a masked LM has positions for


@pytest.mark.parametrize(
    ("model", "options", "lengths"),
    [
        pytest.param(later(models.sequences, "s"), {}, (1, 64, 65, 700), id="LION-S"),
        pytest.param(later(models.masked_lm, "d"), {"form": "parallel", "padding_mask": True}, LENGTHS, id="masked LM, LION-D", marks=slow),
        pytest.param(later(models.vit, "lit"), {}, (6,), id="ViT, LION-LIT", marks=slow),
        pytest.param(later(models.sequences, "lit"), {"padding_mask": True}, (1, 63, 257), id="LION-LIT", marks=slow),
        pytest.param(later(models.sequences, "d"), {"batch": 2}, (1, 63, 257), id="LION-D", marks=slow),
        pytest.param(later(models.sequences, "s", depth=2), {"form": "parallel"}, (1, 63, 257), id="LION-S, parallel", marks=slow),
        pytest.param(later(models.sequences, "s_vector"), {"padding_mask": True}, (1, 63, 257), id="per channel", marks=slow),
        pytest.param(later(models.sequences, "retnet"), {}, (1, 63, 257), id="RetNet", marks=slow),
        pytest.param(later(models.sequences, "symmetric", pooling="class_token"), {}, (1, 63, 257), id="class token", marks=slow),
        pytest.param(later(models.sequences, "softmax"), {"padding_mask": True}, (1, 63, 257), id="softmax", marks=slow),
        pytest.param(later(models.sequences, "hgrn2"), {}, (1, 63, 257), id="HGRN-2", marks=slow),
        pytest.param(later(models.sequences, "mlstm"), {"form": "parallel"}, (1, 63, 257), id="mLSTM", marks=slow),
        pytest.param(later(models.vit, "s"), {"padding_mask": True}, (6,), id="ViT, LION-S", marks=slow),
        pytest.param(later(models.vit, "s_vector"), {"form": "parallel", "batch": 2}, (6,), id="ViT, per channel, parallel", marks=slow),
        pytest.param(later(models.vit, "s", mixer=SCANS), {}, (6,), id="ViT, two scans", marks=slow),
        pytest.param(later(models.masked_lm, "s"), {"token_types": True}, LENGTHS, id="masked LM, LION-S", marks=slow),
        pytest.param(later(models.causal_lm, "s"), {}, LENGTHS, id="causal LM", marks=slow),
        pytest.param(later(models.sequences, "s", **TOWERS), {"form": "parallel"}, LENGTHS, id="two towers", marks=slow),
    ],
)
def test_a_file_gives_the_model_s_outputs_at_any_length(model, options, lengths):
    model = model()
    form = model.form
    report = export(model.train(), "model.pt2", **options)
    about = report["metadata"]
    assert read_metadata("model.pt2") == about and report["errors"] == {}
    # the caller's model stays as it is
    assert model.form == form and model.training and all(p.requires_grad for p in model.parameters())
    model.eval()
    program = load("model.pt2")
    takes = {"mask": "padding_mask" in options or "token_types" in options, "types": "token_types" in options}
    for seed, length in enumerate(lengths):
        batch = options.get("batch", (1, 2, 5)[seed % 3])
        given = inputs(model, batch, length, **takes, seed=seed)
        with torch.no_grad():
            assert different(program(*given), model(*given)) <= 1e-5, length
        for x, described in zip(given, about["inputs"], strict=True):
            shape = [{"batch": batch, "length": length}.get(size, size) for size in described["shape"]]
            assert list(x.shape) == shape and str(x.dtype) == f"torch.{described['dtype']}"


@pytest.mark.parametrize(
    ("model", "block"),
    [
        pytest.param(later(models.causal_lm, "s", depth=1), 1, id="LION-S"),  # "key": the last token's gate is part of the state
        pytest.param(later(models.causal_lm, "d", positional_embedding=False), 4, id="LION-D, blocks", marks=slow),
        pytest.param(later(models.causal_lm, "lit"), 1, id="LION-LIT", marks=slow),
        pytest.param(later(models.causal_lm, "s", norm_position="post"), 4, id="LION-S, blocks", marks=slow),
        pytest.param(later(models.causal_lm, "symmetric", mixer=SYMMETRIC), 3, id="symmetric", marks=slow),
        pytest.param(later(models.causal_lm, "gla"), 3, id="GLA", marks=slow),
        pytest.param(later(models.causal_lm, "retnet"), 1, id="RetNet", marks=slow),
        pytest.param(later(models.causal_lm, "hgrn2"), 2, id="HGRN-2", marks=slow),
        pytest.param(later(models.masked_lm, "s", mixer=models.mixer("s", direction="forward")), 2, id="masked LM, forward", marks=slow),
    ],
)
def test_a_causal_model_step_by_step(model, block):
    model = model()
    about = export(model, "step.pt2", to="step", block=block)["metadata"]
    step = load("step.pt2")
    for batch, blocks in ((1, 1), (2, 5), (3, 13)):
        tokens = torch.randint(20, (batch, blocks * block))
        shapes = [[batch if size == "batch" else size for size in part["shape"]] for part in about["state"]]
        state = tuple(torch.zeros(shape, dtype=getattr(torch, part["dtype"])) for shape, part in zip(shapes, about["state"], strict=True))
        found = []
        for part in tokens.split(block, dim=1):
            logits, state = step(part, state)
            found.append(logits)
        with torch.no_grad():
            assert different(torch.cat(found, dim=1), model(tokens)) <= 1e-5


@slow
def test_the_operator_of_each_layer_and_direction_step_by_step():
    model = models.sequences("d", depth=2)
    report = export(model, "steps", to="step", block=3)
    about = read_metadata("steps")
    assert about == report["metadata"] and len(about["layers"]) == 2 and report["errors"] == {}
    calls = {call["direction"]: call for call in about["layers"][1]["calls"]}
    assert calls["forward"]["file"] == about["layers"][0]["calls"][0]["file"]  # layers that are alike share a graph
    q, k, v = torch.rand(2, 9, 2, 4), torch.rand(2, 9, 2, 4), torch.randn(2, 9, 2, 4)
    decays = {direction: -torch.rand(2) for direction in calls}
    total = 0
    for direction, call in calls.items():
        step, state, found = load(f"steps/{call['file']}"), torch.zeros(2, 2, 4, 5), {}
        for start in (0, 3, 6) if direction == "forward" else (6, 3, 0):
            part = slice(start, start + 3)
            state, num, den = step(state, q[:, part], k[:, part], v[:, part], decays[direction])
            found[start] = torch.cat([num, den[..., None]], dim=-1)
        total = total + torch.cat([found[0], found[3], found[6]], dim=1)
    num, den = bidirectional_linear_attention_parts(q, k, v, decays["forward"], decays["backward"])
    assert different(total, torch.cat([num, den[..., None]], dim=-1)) <= 1e-5


@pytest.mark.parametrize(
    ("model", "options"),
    [
        pytest.param(later(models.sequences, "lit"), {"form": "parallel"}, id="LION-LIT, parallel", marks=slow),
        pytest.param(later(models.sequences, "s"), {"padding_mask": True}, id="LION-S", marks=slow),
        pytest.param(later(models.sequences, "s_vector"), {}, id="per channel", marks=slow),
        pytest.param(later(models.vit, "d"), {}, id="ViT", marks=slow),
        pytest.param(later(models.masked_lm, "s"), {"token_types": True}, id="masked LM", marks=slow),
        pytest.param(later(models.sequences, "softmax"), {}, id="softmax", marks=slow),
    ],
)
def test_onnx_in_onnxruntime(model, options):
    import onnx
    import onnxruntime

    model = model()
    about = export(model, "model.onnx", to="onnx", **options)["metadata"]
    assert read_metadata("model.onnx") == about
    assert [(x.domain, x.version) for x in onnx.load("model.onnx").opset_import] == [("", 20)] and about["opset"] == 20
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    assert [(x.name, x.shape) for x in session.get_inputs()] == [(x["name"], x["shape"]) for x in about["inputs"]]
    takes = {"mask": "padding_mask" in options or "token_types" in options, "types": "token_types" in options}
    for batch, length in ((1, 1), (2, 17), (3, 64)):
        given = inputs(model, batch, length, **takes)
        found = session.run(["logits"], {x.name: y.numpy() for x, y in zip(session.get_inputs(), given, strict=True)})[0]
        with torch.no_grad():
            assert different(torch.from_numpy(found), model(*given)) <= 1e-5


@slow
@pytest.mark.parametrize(
    ("to", "output", "keys"),
    [
        ("torch-export", "model.pt2", ["length 6", "length 39", "length 76"]),
        ("onnx", "model.onnx", ["length 6", "length 39", "length 76"]),
        ("step", "steps", ["length 5 of layer 0", "length 2 of layer 0", "length 9 of layer 0"]),
    ],
)
def test_a_verified_file_says_how_far_it_is_off(to, output, keys):
    errors = export(models.sequences("s"), output, to=to, verify=True)["errors"]
    assert list(errors) == keys and max(errors.values()) < 1e-5


def test_a_file_that_differs_is_not_written(monkeypatch, tmp_path):
    right = streaming.exported_step
    monkeypatch.setattr(streaming, "exported_step", lambda *arguments: right(*arguments[:-1], 0.999 * arguments[-1]))
    with pytest.raises(UserError, match=r"a step differs from the model by .* at length .*: no file was written"):
        export(models.sequences("lit", mixer=models.mixer("lit", direction="forward")), "steps", to="step", verify=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (later(models.sequences, "softmax"), {"to": "step"}, "layer 0 is SoftmaxAttention, which has no step"),
        (later(models.sequences, "softmax"), {"form": "parallel"}, "softmax attention is one form"),
        (later(models.sequences, "s"), {"to": "step"}, "give an output without .pt2, a folder"),
        (later(models.causal_lm, "s"), {"to": "step", "output": "folder"}, "is one graph: give an output that ends in .pt2"),
        (later(models.causal_lm, "s"), {"to": "step", "block": 65}, "block=65 is more than the 64 tokens"),
        (later(models.causal_lm, "mlstm"), {"to": "step"}, "layer 0 has no exported step .* MLSTM keeps more"),
        (later(models.causal_lm, "s", mixer=BEFORE), {"to": "step"}, "scale='before' divides by sums over all tokens"),
        (later(models.sequences, "s"), {"token_types": True}, "this SequenceClassifier has no token types"),
        (later(torch.nn.Linear, 2, 2), {}, "Linear is no model of this package"),
        (later(models.sequences, "s", mixer=GROWING), {}, "form=chunkwise: 'chunkwise' is not a form"),
        pytest.param(later(models.sequences, "s_vector"), {"form": "parallel"}, r"here 17 to 32\); give form=chunkwise", marks=slow),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(model, options, words, tmp_path):
    options = dict(options)
    with pytest.raises(UserError, match=words):
        export(model(), options.pop("output", "model.pt2"), **options)
    assert list(tmp_path.iterdir()) == []
