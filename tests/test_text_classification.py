"""Runs on texts with labels: a set of one's own, GLUE's tasks, weights of a language model, several devices, interruption, mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lba_exp
from lba_exp import evaluating
from lba_exp.commands import train as command
from lba_exp.composing import compose
from lba_exp.convert import from_pretrained
from lba_exp.errors import ConfigError, UserError
from lba_exp.models.pretrained import create
from lba_exp.results.metrics_log import read_rows
from tests import forked, glue
from tests.corpus import write_corpus
from tests.test_family import LM

TINY = ["model=lion_s_mlm", "model.width=32", "model.depth=2", "model.heads=2", "model.mlp_ratio=4", "model.dropout=0"]
TINY += ["trainer.accelerator=cpu", "logger=csv", "threads=1", "trainer.max_epochs=1", "data.max_length=16", "optim.lr=1e-3"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A vocabulary, and GLUE's tasks as the hub has them."""
    root = tmp_path_factory.mktemp("glue")
    glue.write_vocabulary(root)
    for task in glue.TASKS:
        glue.write_hub(root / task, task)
    return root


@pytest.fixture(scope="module")
def pretrained(places, tmp_path_factory):
    """A masked language model's run folder."""
    corpus = tmp_path_factory.mktemp("corpus")
    overrides = [*LM, *TINY, "trainer.limit_train_batches=4", *write_corpus(corpus / "texts"), f"folder={corpus / 'mlm'}", "parity=off"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(corpus)
        lba_exp.train(compose([*overrides, f"data.vocabulary={places / 'vocab.txt'}"]), quiet=True)
    return corpus / "mlm"


def of(places, task, *overrides):
    return [*TINY, f"data=glue_{task}", f"data.source={places / task}", f"data.vocabulary={places}", "data.batch_size=8", *overrides]


def predictions(folder, split="test"):
    """Logits and labels of a run's best checkpoint, sample by sample without padding."""
    from lba_exp import build
    from lba_exp.callbacks.checkpoints import load_checkpoint

    cfg = evaluating.configuration(folder)
    data = build.data_module(cfg)
    model = evaluating.load_model(folder, cfg, data, load_checkpoint(folder / "checkpoints" / "best.ckpt"))
    model.set_form("recurrent")
    logits, labels = [], []
    with torch.no_grad():
        for tokens, second, label in (data._split(split)[i] for i in range(len(data._split(split)))):
            types = (torch.arange(len(tokens)) >= second).long()[None]
            logits.append(model(torch.from_numpy(tokens)[None], token_types=types)[0].numpy())
            labels.append(label)
    return np.stack(logits), np.array(labels)


def expected_metrics(task, logits, labels):
    from scipy import stats
    from sklearn import metrics

    guess = logits.argmax(-1)
    return {
        "cola": lambda: {"matthews": metrics.matthews_corrcoef(labels, guess)},
        "stsb": lambda: {
            "pearson": stats.pearsonr(logits[:, 0], labels).statistic,
            "spearman": stats.spearmanr(logits[:, 0], labels).statistic,
        },
        "mrpc": lambda: {"accuracy": metrics.accuracy_score(labels, guess), "f1": metrics.f1_score(labels, guess)},
    }.get("mrpc" if task == "qqp" else task, lambda: {"accuracy": metrics.accuracy_score(labels, guess)})()


@pytest.mark.parametrize("task", glue.TASKS)
def test_every_task_trains_from_a_language_model_and_is_judged_as_sklearn_and_scipy_do(places, pretrained, task, capsys):
    """The recurrent form sample by sample, without padding, is the judge of padded batches too."""
    run = of(places, task, f"init_from={pretrained}", "optim.lr=5e-3", "trainer.max_epochs=2", "parity=strict", "data.eval_batch_size=5")
    record = lba_exp.train(compose([*run, "folder=run"]), quiet=True)
    logits, labels = predictions(Path("run"))
    assert len(labels) == 13 and len(np.unique(np.round(logits, 5), axis=0)) > 2
    expected = expected_metrics(task, logits, labels)
    test = record["metrics"]["test"]
    assert {name: test[name] for name in expected} == pytest.approx(expected, abs=2e-5)
    assert test["score"] == pytest.approx(np.mean(list(expected.values())), abs=2e-5)
    loss = ((logits[:, 0] - labels) ** 2).mean() if task == "stsb" else None
    assert loss is None or test["loss"] == pytest.approx(loss, rel=1e-4)
    assert ("accuracy" in test) == (task != "stsb") and record["best"]["monitor"] == "val/score"
    assert record["parity"]["verdict"] == "pass" and {"recurrent", "chunkwise"} <= record["parity"]["forms"].keys()
    rows = [row for row in read_rows(Path("run/metrics.csv")) if "val/score" in row]
    best = max(rows, key=lambda row: (row["val/score"], -row["val/loss"]))
    assert record["best"]["step"] == best["step"]
    if task in ("stsb", "cola", "mrpc"):
        evaluated = lba_exp.evaluate("run")["forms"]["recurrent"]
        assert evaluated["count"] == 13 and evaluated["accuracy"] == (None if task == "stsb" else pytest.approx(test["accuracy"]))
        assert {name: evaluated[name] for name in expected} == pytest.approx(expected, abs=2e-5)
        assert next(iter(expected)) in capsys.readouterr().out


def test_the_weights_of_another_run(places, pretrained, tmp_path):
    """The encoder of a language model, the pooler of another task's classifier, shorter texts, and a model folder."""

    def start(name, *overrides):
        run = of(places, "mnli" if name == "mnli" else "rte", "optim.lr=1e-30", "parity=off", f"folder={name}", *overrides)
        lba_exp.train(compose(run), quiet=True)
        return torch.load(f"{name}/checkpoints/best.ckpt", weights_only=True)["state_dict"], Path(name, "train.log").read_text()

    language = torch.load(pretrained / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    mnli, told = start("mnli", f"init_from={pretrained}")
    assert "the encoder's weights are taken, pooler and head start anew" in told
    encoder = [name for name in language if name.startswith("model.encoder.")]
    assert len(encoder) > 20 and all(torch.equal(language[name], mnli[name]) for name in encoder)
    rte, told = start("rte", "init_from=mnli", "data.max_length=12", "seed=1", "model.mixer.convention=query")
    assert "the encoder's weights are taken, head start anew" in told and "convention=key, and this run has query" in told
    assert torch.equal(rte["model.pooler.0.weight"], mnli["model.pooler.0.weight"])
    assert torch.equal(rte["model.encoder.positions.weight"], mnli["model.encoder.positions.weight"][:12])
    lba_exp.convert.read_model("mnli").save_pretrained("saved")
    again, told = start("again", "init_from=saved", f"data.source={places / 'rte'}")
    assert torch.equal(again["model.encoder.embedding.weight"], mnli["model.encoder.embedding.weight"])
    assert from_pretrained("saved").config["classes"] == 3
    filled = create(lba_exp.convert.read_model(pretrained).config | {"vocabulary": 24})  # 19 tokens, filled up to a multiple of 8
    filled.save_pretrained("filled")
    cut, _ = start("cut", "init_from=filled/model.safetensors")
    assert torch.equal(cut["model.encoder.embedding.weight"], filled.encoder.embedding.weight[:19])


def test_weights_that_do_not_fit_are_explained(places, pretrained, tmp_path):
    def words(*names):
        path = glue.write_vocabulary(tmp_path / "".join(names)) / "vocab.txt"
        path.write_text(path.read_text().replace("house", names[0]) + "".join(f"{name}\n" for name in names[1:]))
        return path

    digits = [override for override in TINY if not override.startswith("data.")]
    lba_exp.train(compose([*digits, "folder=digits", "trainer.max_steps=1", "parity=off"]), quiet=True)
    (tmp_path / "none").mkdir()
    for overrides, sentence in (
        ([f"data.vocabulary={words('house', 'mouse')}"], "vocabulary of 19 tokens, and data.vocabulary one of 20: give the one it was"),
        ([f"data.vocabulary={words('mouse')}"], "trained with another vocabulary of as many tokens"),
        (["model.width=16"], "has 32 as model.width, and this run 16: give model.width=32"),
        (["model.depth=3"], "has 2 as model.depth, and this run 3"),
        (["model.heads=4"], "has 2 as model.heads, and this run 4"),
        (["model.positional_embedding=false"], "has a positional embedding: give model.positional_embedding=true"),
        (["data.max_length=32"], "has 16 positions, and data.max_length=32: give data.max_length=16, or less"),
        (["model=lion_lit"], "holds another model: encoder.blocks.0.mixer.gate"),
        (["init_from=digits"], "holds no encoder of text"),
        ([f"init_from={tmp_path / 'none'}"], "none holds neither checkpoints/best.ckpt nor model.safetensors"),
        (["init_from=nowhere"], "nowhere is no file"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            lba_exp.train(compose([*of(places, "rte", f"init_from={pretrained}"), *overrides, "folder=run"]), quiet=True)
        assert not Path("run").exists()


def test_settings_that_do_not_go_together_are_named(places):
    for overrides, sentence in (
        (["size=bert_mini", "model.kind=masked_lm"], "gives a text no label"),
        (["data.vocabulary=null"], "data.vocabulary=None is no file: give a WordPiece vocabulary"),
        (["data.tokens=bytes"], "means nothing to data.tokens=bytes"),
        (["data.metrics=[f2]"], "'f2' is not a metric of data.target=classes; did you mean f1"),
        (["data.target=number"], "'accuracy' is not a metric of data.target=number"),
        (["data.target=number", "data.metrics=[pearson]", "checkpoint.monitor=val/accuracy"], "give checkpoint.monitor=val/score"),
        (["data.target=number", "data.metrics=[]", "optim.label_smoothing=0.1"], "give optim.label_smoothing=0"),
        (["data.glue_task=wnli"], "'wnli' is not valid for data.glue_task"),
        (["task=language_modelling"], "give task=classification"),
        (["model.mixer.direction=forward"], "reads the first token alone"),
    ):
        with pytest.raises(UserError, match=sentence):
            compose([*of(places, "sst2"), *overrides])
    with pytest.raises(ConfigError, match="val/score is for texts with labels"):
        compose(["checkpoint.monitor=val/score"])


def test_a_mistake_in_the_data_ends_the_command_with_one_sentence(places, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([*of(places, "sst2"), "data.text_column=sentense", "folder=run"])
    assert stop.value.code == 1 and not Path("run").exists()
    said = capsys.readouterr().err.strip()
    assert "did you mean sentence?" in said and len(said.splitlines()) == 1 and "Traceback" not in said


def test_bytes_with_mean_pooling_and_every_cut_text_is_counted(tmp_path):
    import csv

    rng = np.random.default_rng(0)
    for split, samples in (("train", 48), ("test", 9)):
        with open(tmp_path / f"{split}.tsv", "w") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["text", "label"])
            writer.writerows(("ab"[row % 2] * int(rng.integers(3, 30)), "xy"[row % 2]) for row in range(samples))
    run = ["data=text_classification", "model.kind=sequence_classifier", "data.tokens=bytes", f"data.source={tmp_path}"]
    run += ["model=lion_s", "parity=strict", "optim.lr=3e-3", "trainer.max_epochs=4", "data.batch_size=8", "data.eval_batch_size=4"]
    record = lba_exp.train(compose([*TINY, *run, "folder=run"]), quiet=True)
    assert record["metrics"]["test"]["accuracy"] == 1 and record["parity"]["verdict"] == "pass"
    log = Path("run/train.log").read_text()
    assert "train split: " in log and " of 48 texts are longer than data.max_length=16 tokens and are cut." in log
    assert json.loads(Path("run/result.json").read_text())["metrics"]["validation"]["score"] == 1


DEVICES = ["data.global_batch_size=8", "data.eval_batch_size=3", "trainer.max_epochs=2", "optim.lr=3e-3", "parity=off", "folder=run"]
DEVICES += ["data.bucket_steps=2", "trainer.log_every_n_steps=1", "trainer.gradient_clip_val=null"]


@pytest.mark.parametrize(("task", "pieces"), [("mrpc", 1), ("stsb", 2)])
def test_two_devices_count_every_sample_once(places, tmp_path, task, pieces):
    """13 samples on two devices; training in buckets is that on one device too."""
    found = []
    for name, devices in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        run = of(places, task, *DEVICES, *([f"trainer.accumulate_grad_batches={pieces}", "trainer.strategy=ddp"] if devices == 2 else []))
        answers = forked.run_on_many(tmp_path / name, run, devices) if devices == 2 else [forked.run(tmp_path / name, run)]
        assert [code for code, _ in answers] == [0] * devices, answers
        found.append((answers[0][1][1]["metrics"], read_rows(tmp_path / name / "run" / "metrics.csv")))
    (one, rows), (two, others) = found
    assert two["test"] == pytest.approx(one["test"], rel=1e-4, abs=1e-5) and two["validation"] == pytest.approx(
        one["validation"], rel=1e-4, abs=1e-5
    )
    losses = [[row["train/step_loss"] for row in which if "train/step_loss" in row] for which in (rows, others)]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_run_that_was_killed_inside_an_epoch_goes_on_bit_equal(places, tmp_path):
    run = of(places, "qqp", *DEVICES, "model.dropout=0.1", "checkpoint.every_n_steps=1")
    kept = []
    for name, kill in (("whole", None), ("killed", ("on_train_batch_end", 5))):
        (tmp_path / name).mkdir()
        code, answer = forked.run(tmp_path / name, run, kill=kill)
        if kill is not None:
            assert answer is None and code == -9
            code, answer = forked.run(tmp_path / name, run)
        assert (code, answer[0]) == (0, "record"), answer
        content = torch.load(tmp_path / name / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        rows = [
            {k: v for k, v in row.items() if not k.startswith("efficiency")} for row in read_rows(tmp_path / name / "run" / "metrics.csv")
        ]
        kept.append((content["state_dict"], answer[1]["metrics"], rows))
    assert kept[0][1:] == kept[1][1:]
    assert all(torch.equal(value, kept[1][0][name]) for name, value in kept[0][0].items())
