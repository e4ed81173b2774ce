"""Runs of the other models: from a configuration to a record, on a vision model and on language models; sizes; what does not fit."""

import pytest
import torch

import lba_exp
from lba_exp import build
from lba_exp.convert import from_pretrained
from lba_exp.data.spec import DataSpec
from lba_exp.errors import ConfigError, UserError
from lba_exp.tasks.classification import Classification

from .conftest import SMALL
from .corpus import write_corpus

VIT = ["size=vit_tiny", "model.width=16", "model.depth=2", "model.heads=2", "data.layout=image", "model.patch_size=2"]
LM = ["size=bert_mini", "model.width=32", "model.depth=2", "model.heads=2", "task=language_modelling", "data=text", "data.max_length=16"]
LM += [
    "data.test_fraction=0.2",
    "data.batch_size=16",
    "optim.label_smoothing=0",
    "trainer.accelerator=cpu",
    "logger=csv",
    "threads=1",
    "model.dropout=0",
]


@pytest.mark.parametrize("model", ["lion_s_multiscan", "softmax"])
def test_a_vision_model_runs(model, tmp_path):
    cfg = lba_exp.compose([*SMALL, *VIT, f"model={model}", "model.width=16", "trainer.max_epochs=1", f"folder={tmp_path / 'run'}"])
    record = lba_exp.train(cfg, quiet=True)
    assert record["status"] == "finished" and record["metrics"]["test"]["accuracy"] > 0
    if model != "softmax":
        assert record["parity"]["verdict"] == "pass" and set(record["parity"]["forms"]) == {"parallel", "recurrent", "chunkwise"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def test_a_masked_language_model_learns(corpus, tmp_path):
    overrides = [*LM, *corpus, "model=lion_s", "trainer.max_epochs=12", "optim.lr=5e-3", f"folder={tmp_path / 'run'}"]
    record = lba_exp.train(lba_exp.compose(overrides), quiet=True)
    # the commonest of 13 words is right once in 13 times; neighbours tell the word nine times of ten
    assert record["metrics"]["validation"]["accuracy"] > 0.5 and record["parity"]["verdict"] == "pass"
    result = lba_exp.evaluate(tmp_path / "run", split="validation", form="recurrent", quiet=True)
    assert result["forms"]["recurrent"]["accuracy"] == pytest.approx(record["metrics"]["validation"]["accuracy"])


def test_a_causal_language_model_learns(corpus, tmp_path):
    causal = ["size=gpt_small", "data.objective=causal", "model=lion_s", "trainer.max_epochs=4", "optim.lr=5e-3"]
    record = lba_exp.train(lba_exp.compose([*LM, *corpus, *causal, f"folder={tmp_path / 'run'}"]), quiet=True)
    assert record["metrics"]["validation"]["accuracy"] > 0.5 and record["parity"]["verdict"] == "pass"


def test_compiled_training_is_the_same_training(tmp_path, monkeypatch):
    compiled = []

    def spy(function, **options):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", spy)
    records = []
    for flag in ("false", "true"):
        overrides = [*SMALL, "trainer.max_epochs=1", "parity=off", f"compile={flag}", f"folder={tmp_path / flag}"]
        records.append(lba_exp.train(lba_exp.compose(overrides), quiet=True))
    assert len(compiled) == 1 and records[0]["metrics"] == records[1]["metrics"]


def test_a_model_without_blocks_is_compiled_whole(monkeypatch):
    class Plain(torch.nn.Linear):
        def forward(self, inputs, padding_mask=None):
            return super().forward(inputs)

    compiled, model, x = [], Plain(3, 2), torch.randn(4, 3)
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    task = Classification(model, classes=2, optim={})
    assert torch.equal(task({"inputs": x}), model(x)) and not compiled
    task.compile_model()
    assert torch.equal(task({"inputs": x}), model(x)) and compiled == [model.forward]


SPECS = {
    "vit": DataSpec("images", 224 * 224, 1000, [], 3, None, {}, "", grid=(224, 224)),
    "bert": DataSpec("text", 512, 30522, [], None, 30522, {}, ""),
}
# counted by others: timm's DeiT (vit), Hugging Face's BertForMaskedLM (bert)
COUNTS = {
    "vit_tiny": 5_717_416,
    "vit_small": 22_050_664,
    "vit_base": 86_567_656,
    "bert_base": 109_514_298,
    "bert_large": 335_174_458,
}


@pytest.mark.parametrize("size", COUNTS)
def test_sizes_have_the_parameters_of_the_models_they_are_named_after(size):
    kind = size.split("_")[0]
    fitting = (
        ["data.layout=image"]
        if kind == "vit"
        else ["task=language_modelling", "data=text", "data.source=digits", f"data.vocabulary={__file__}"]
    )
    cfg = lba_exp.compose([f"size={size}", "model=softmax", *fitting])
    with torch.device("meta"):
        model = build.model(cfg.model, SPECS[kind])
    assert sum(p.numel() for p in model.parameters()) == COUNTS[size]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["size=vit_tiny"], "model.kind=vit does not take data.layout=pixels: give data.layout=image"),
        (["data.layout=image"], "model.kind=sequence_classifier does not take data.layout=image: give data.layout=pixels"),
        (["size=vit_tinny"], "did you mean vit_tiny"),
        (["model.kind=two_towers"], "does not read images"),
        (["data=text", "data.source=digits"], "is no language model"),
        (["data=text", "data.source=digits", "size=gpt_small"], "give data.objective=causal"),
        (["data=text", "data.source=digits", "size=bert_mini"], "data.vocabulary=None is no file"),
        (["task=language_modelling"], "task=language_modelling does not go with data.kind=pixel_sequences: give task=classification"),
    ],
)
def test_what_does_not_fit_is_named_early(overrides, words):
    with pytest.raises(UserError, match=words):
        lba_exp.compose(overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.norm=batch"], "model.norm=batch means nothing to VisionTransformer: it takes .*patch_size"),
        (["model.patch_size=3"], r"model: patch_size: expected a divisor .*\(8, 8\), got 3"),
    ],
)
def test_settings_that_a_model_does_not_take_are_named(overrides, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        lba_exp.train(lba_exp.compose([*SMALL, *VIT, *overrides, f"folder={tmp_path / 'run'}"]), quiet=True)
    assert not (tmp_path / "run").exists()


def test_data_settings_that_do_nothing_are_named(corpus):
    with pytest.raises(ConfigError, match=r"data\.augment=shift means nothing to TextBlocks"):
        build.data_module(lba_exp.compose([*LM, *corpus, "data.augment=shift"]))


@pytest.mark.parametrize("size", [["size=vit_tiny", "data.layout=image", "model.patch_size=4"], []])
@pytest.mark.parametrize("direction", ["both", "alternating"])
def test_a_built_model_survives_its_folder(size, direction, tmp_path):
    overrides = ["model=lion_s_multiscan", *size, "model.width=16", "model.depth=2", "model.heads=2", f"model.mixer.direction={direction}"]
    cfg = lba_exp.compose(overrides)
    model = build.model(cfg.model, DataSpec("images", 64, 3, [], 1, None, {}, "", grid=(8, 8))).eval()
    model.save_pretrained(tmp_path / "x")
    inputs = torch.randn(2, 1, 8, 8) if size else torch.randn(2, 64, 1)
    assert torch.equal(from_pretrained(tmp_path / "x")(inputs), model(inputs))
    assert [m.direction for m in model.mixers] == (["forward", "backward"] if direction == "alternating" else ["both", "both"])
