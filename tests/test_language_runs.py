"""Runs of language models: vocabularies, streams on several devices and after a kill, longer texts, the optimizer's recipe, mistakes."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lba_exp
from lba_exp.commands import evaluate as evaluation
from lba_exp.commands import train as command
from lba_exp.composing import compose
from lba_exp.errors import ConfigError
from lba_exp.results.metrics_log import read_rows
from lba_exp.tasks.classification import Classification, rate_over_peak
from tests import forked
from tests.corpus import write_corpus
from tests.test_family import LM

CAUSAL = ["size=gpt_small", "model.width=32", "model.depth=2", "model.heads=2", "data.objective=causal", "model=lion_s"]
CAUSAL += ["model.positional_embedding=false"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", splits=("train", "validation", "test"))


def without_vocabulary(corpus):
    return [override for override in corpus if not override.startswith("data.vocabulary")]


@pytest.mark.parametrize("tokens", [["data.vocabulary_size=64"], ["data.tokens=bpe", "data.vocabulary_size=300"], ["data.tokens=bytes"]])
def test_a_masked_model_learns_from_tokens_of_its_own(corpus, tokens, tmp_path):
    run = [*LM, *without_vocabulary(corpus), *tokens, f"data.cache={tmp_path / 'kept'}", "model=lion_s", "optim=mlm", "optim.lr=5e-3"]
    record = lba_exp.train(compose([*run, "trainer.max_epochs=2", "data.max_length=24", "folder=run"]), quiet=True)
    vocabulary = len(torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]["model.bias"])
    test = record["metrics"]["test"]
    assert test["loss"] < 0.75 * math.log(vocabulary) and record["parity"]["verdict"] == "pass"
    assert test["perplexity"] == pytest.approx(math.exp(test["loss"]), rel=1e-4)
    said = Path("run/train.log").read_text()
    assert ("trained on the texts: " in said) == ("data.tokens=bytes" not in tokens)


def test_a_vocabulary_that_does_not_fit_the_weights_is_named(corpus, tmp_path):
    run = [*LM, *corpus, "model=lion_s", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "parity=off"]
    lba_exp.train(compose([*run, "folder=first"]), quiet=True)
    words = Path(corpus[1].partition("=")[2]).read_text()
    for text, sentence in (
        (words + "mouse\n", "first has a vocabulary of 19 tokens, and data.vocabulary one of 20: give the one it was trained with"),
        (words.replace("house", "mouse"), "first was trained with another vocabulary of as many tokens"),
    ):
        (tmp_path / "other.txt").write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            lba_exp.train(compose([*run, f"data.vocabulary={tmp_path / 'other.txt'}", "init_from=first", "folder=second"]), quiet=True)
        assert not Path("second").exists()
    lba_exp.train(compose([*run, "init_from=first", "folder=second"]), quiet=True)


def test_a_causal_model_runs_on_longer_texts_than_it_was_trained_on(corpus, tmp_path, capsys):
    record = lba_exp.train(compose([*LM, *corpus, *CAUSAL, "trainer.max_epochs=3", "optim.lr=5e-3", "folder=run"]), quiet=True)
    assert record["parity"]["verdict"] == "pass" and record["metrics"]["test"]["perplexity"] < 6
    figures = {}
    for length in (16, 128):
        evaluation.main(["run", f"data.max_length={length}", "--output", f"{length}.json"])
        figures[length] = json.loads(Path(f"{length}.json").read_text())["forms"]
    assert "perplexity" in capsys.readouterr().out
    assert figures[16]["parallel"]["perplexity"] == pytest.approx(record["metrics"]["test"]["perplexity"], rel=1e-4)
    # a word depends on the one before it alone: length changes nothing, in whatever form
    for form in ("parallel", "recurrent", "chunkwise"):
        assert figures[128][form]["perplexity"] < 1.2 * figures[16][form]["perplexity"] and figures[128][form].get("rel", 0) < 1e-4
    positions = [*LM, *corpus, *CAUSAL, "model=softmax", "model.positional_embedding=true", "trainer.max_epochs=1", "folder=softmax"]
    lba_exp.train(compose(positions), quiet=True)
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["softmax", "data.max_length=128"])
    assert stop.value.code == 1 and "use data of the same length" in capsys.readouterr().err


STREAM = [*LM, "model=lion_s", "data=text_stream", "data.test_split=test", "data.global_batch_size=16", "trainer.max_epochs=-1"]
STREAM += ["trainer.max_steps=8", "trainer.val_check_interval=4", "data.shuffle_blocks=30", "optim.lr=3e-3", "parity=off"]
STREAM += ["checkpoint.every_n_steps=1", "trainer.log_every_n_steps=1", "folder=run", "model.dropout=0.1"]


def kept_of(folder):
    content = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    rows = [{k: v for k, v in row.items() if not k.startswith("efficiency")} for row in read_rows(folder / "run" / "metrics.csv")]
    [loader] = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return content["state_dict"], rows, loader


@pytest.mark.parametrize(
    ("devices", "workers"), [(2, 0), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_a_streamed_run_that_was_killed_goes_on_bit_equal(corpus, tmp_path, devices, workers):
    kept = []
    run = [*STREAM, *corpus, f"data.workers={workers}", *(["trainer.strategy=ddp"] if devices == 2 else [])]
    for name, kill in (("whole", None), ("killed", ("on_train_batch_end", 6))):
        (tmp_path / name).mkdir()
        if kill is not None:
            answers = forked.run_on_many(tmp_path / name, run, devices, kill=(None, kill))
            assert all(code == -9 for code, _ in answers), answers
        answers = forked.run_on_many(tmp_path / name, run, devices)
        assert [code for code, _ in answers] == [0] * devices, answers
        kept.append((*kept_of(tmp_path / name), answers[0][1][1]["metrics"]))
    (weights, rows, loader, metrics), (others, again, place, same) = kept
    assert loader == place and loader["position"] == 8 and len(loader["places"]) == devices  # each device's own lanes
    blocks = [place["serial"] + place["emitted"] for places in loader["places"] for place in places]
    assert sum(blocks) == 8 * 16 and len(blocks) == devices * max(1, workers)
    # means over both parts of a run's training are sums in another order
    assert [pytest.approx(row, rel=1e-6) for row in rows] == again and metrics["test"] == same["test"]
    assert [row["step"] for row in rows if "val/loss" in row] == [4, 8]
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def decoupled_adamw(w, gradients, rates, peak, decay, betas, eps):
    """MosaicML's rule in float64: (1 - decay x rate / peak rate) w, then Adam's step."""
    mean, square = np.zeros_like(w), np.zeros_like(w)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        w = w * (1 - decay * rate / peak)
        mean, square = betas[0] * mean + (1 - betas[0]) * gradient, betas[1] * square + (1 - betas[1]) * gradient**2
        w = w - rate * (mean / (1 - betas[0] ** step)) / (np.sqrt(square / (1 - betas[1] ** step)) + eps)
    return w


@pytest.mark.parametrize(("decay_per_step", "lr_batch"), [(True, None), (False, None), (True, 64)])
def test_the_recipe_is_decoupled_adamw_on_a_line(decay_per_step, lr_batch):
    optim = dict(compose(["optim=mlm"]).optim) | {"decay_per_step": decay_per_step, "weight_decay": 0.01, "lr_batch": lr_batch}
    assert (optim["schedule"], optim["final_fraction"], optim["warmup_fraction"], optim["eps"]) == ("linear", 0.2, 0.06, 1e-6)
    model, steps = torch.nn.Linear(3, 2).double(), 50
    task = Classification(model, classes=2, optim=dict(optim))
    data = SimpleNamespace(batch_size=8, sequence_parallel_size=2)
    task.trainer = SimpleNamespace(max_epochs=-1, max_steps=steps, datamodule=data, world_size=4, accumulate_grad_batches=2)
    made = task.configure_optimizers()
    start, bias = model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy()
    rng, rates, gradients = np.random.default_rng(0), [], []
    for _ in range(steps):
        gradients.append(rng.normal(size=(2, 3)))
        rates.append(made["optimizer"].param_groups[0]["lr"])
        model.weight.grad, model.bias.grad = torch.from_numpy(gradients[-1].copy()), torch.zeros(2).double()
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    peak, betas = optim["lr"] * (8 * 2 * 2 / 64 if lr_batch else 1), optim["betas"]
    decay = 0.01 if decay_per_step else 0.01 * peak  # torch's: times the rate
    expected = decoupled_adamw(start, gradients, rates, peak, decay, betas, optim["eps"])
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_array_equal(model.bias.detach().numpy(), bias)  # no decay on biases
    assert rates[3] == peak == max(rates) and rates[0] == peak / 4
    assert np.diff(rates[3:]) == pytest.approx(-0.8 * peak / 47)  # a line, that ends at a fifth behind the last step
    assert rate_over_peak(steps, steps, 0.06, 0.2, "linear") == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data=text_stream", "trainer.max_epochs=2"], "no end that a run could reach: give trainer.max_epochs=-1 trainer.max_steps=N"),
        (["data=text_stream", "trainer.max_epochs=-1", "trainer.max_steps=3", "trainer.overfit_batches=2"], "gives no batch twice"),
        (["data=text_stream", "trainer.max_epochs=-1", "trainer.max_steps=3", "optim.warmup_epochs=1"], "which has no epochs"),
        (["data.vocabulary_size=100"], "data.vocabulary=.* is given, and data.vocabulary_size=100 of one to train"),
        (["data.tokens=bytes"], "means nothing to data.tokens=bytes"),
        (["data.vocabulary=null"], "data.vocabulary_size=8000 trains one on a corpus, data.tokens=bytes needs none"),
        (["data.tokens=chars"], "'chars' is not valid for data.tokens"),
        (["optim.schedule=constant"], "'constant' is not valid for optim.schedule"),
    ],
)
def test_settings_that_do_not_go_together_are_named(corpus, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence) if "null" not in overrides[0] else pytest.raises(Exception, match=sentence):
        compose([*LM, *corpus, "model=lion_s", *overrides])


def test_mistakes_end_the_command_with_one_sentence(corpus, tmp_path, capsys):
    import datasets

    (tmp_path / "empty").mkdir()
    datasets.Dataset.from_dict({"text": ["the cat"] * 9}).to_parquet(str(tmp_path / "empty" / "train.parquet"))
    datasets.Dataset.from_dict({"text": [""] * 9}).to_parquet(str(tmp_path / "empty" / "validation.parquet"))
    stream = ["data=text_stream", "trainer.max_epochs=-1", "trainer.max_steps=3"]
    for overrides, sentence in (
        (["data.text_column=txt"], "did you mean text"),
        ([*stream, "data.text_column=txt"], "did you mean text"),
        ([f"data.source={tmp_path / 'empty'}"], "validation split of empty is too small for one block of 16 tokens"),
        ([*stream, f"data.source={tmp_path / 'empty'}"], "validation split of empty is too small for one block of 16 tokens"),
        ([*stream, "data.vocabulary_size=100", "data.vocabulary=null"], "data.vocabulary_size=100 means nothing to TextStream"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main([*LM, *corpus, "model=lion_s", *overrides, "folder=run"])
        said = capsys.readouterr().err.strip()
        assert stop.value.code == 1 and sentence in said and len(said.splitlines()) == 1 and not Path("run").exists(), said
