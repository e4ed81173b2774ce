"""What a run leaves on W&B, read back from real offline files."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import lba_exp
from lba_exp import tracking
from lba_exp.callbacks.samples import Samples
from lba_exp.data.images import PixelSequences
from lba_exp.results.metrics_log import read_rows
from tests import wandb_file
from tests.corpus import write_corpus
from tests.test_family import LM


def logged(folder: Path) -> dict:
    """Key -> its last value in the history."""
    return {key: value for row in wandb_file.read(folder)[1] for key, value in row.items()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The folder of a finished run of the digits, begun in a repository, and the commit there."""
    from tests.conftest import SMALL

    place = tmp_path_factory.mktemp("digits")
    git = ["git", "-C", str(place), "-c", "user.name=x", "-c", "user.email=x@x.x"]
    for command in (["init", "-q"], ["commit", "-qm", "x", "--allow-empty"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    overrides = [*(o for o in SMALL if not o.startswith("logger")), "logger.tags=[mine]", "logger.project=ours"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        record = lba_exp.train(lba_exp.compose(overrides), quiet=True)
    return Path(record["folder"]), commit


def test_names_group_tags_configuration_and_commit(digits):
    folder, commit = digits
    config, _, code = wandb_file.read(folder)
    (run,) = wandb_file.runs(folder)
    assert code == 0 and (run.run_id, run.project) == ((folder / "wandb_id").read_text(), "ours")
    assert (run.run_group, run.job_type, list(run.tags)) == ("digits", "train", ["lion_s", "digits", "mine"])
    assert run.display_name.startswith("lion_s") and run.display_name.endswith("seed0")
    ours = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: config[key] for key in ours} == ours and config["model"]["mixer"]["gate"] == "selective"
    assert run.git.commit == commit == wandb_file.summary(folder)["record"]["git"]["commit"]


def test_numbers_and_the_record(digits):
    folder, _ = digits
    stored, summary = json.loads((folder / "result.json").read_text()), wandb_file.summary(folder)
    assert summary["record"] == {key: value for key, value in stored.items() if key != "folder"}
    assert summary["test/accuracy"] == stored["metrics"]["test"]["accuracy"]
    rows = [row for row in wandb_file.read(folder)[1] if "val/accuracy" in row]
    for row, local in zip(rows, [r for r in read_rows(folder / "metrics.csv") if "val/accuracy" in r], strict=True):
        kept = {key: value for key, value in local.items() if key not in ("step", "train/step_loss", "optim/lr")}  # rows of their own
        assert {key: row[key] for key in kept} == kept and row["trainer/global_step"] == local["step"]
        assert {"train/loss", "parity/recurrent/rel", "parity/chunkwise/peak_bytes", "efficiency/tokens_per_second"} <= row.keys()


def test_the_table_of_forms(digits):
    folder, _ = digits
    forms = json.loads((folder / "result.json").read_text())["parity"]["forms"]
    rows = {row.pop("form"): row for row in wandb_file.table(folder, logged(folder)["forms"])}
    assert rows.keys() == forms.keys() == {"parallel", "recurrent", "chunkwise"}
    for form, row in rows.items():
        assert row == {key: forms[form].get(key) for key in tracking.FIGURES} and row["latency_ms"] > 0 and row["peak_bytes"] > 0
    assert rows["recurrent"]["agreement"] == 1 and rows["recurrent"]["accuracy"] is not None


def test_pictures_of_test_samples(digits):
    folder, _ = digits
    found = logged(folder)
    assert found["run"]["_type"] == "image-file" and found["samples"]["_type"] == "images/separated"
    data = PixelSequences()
    data.setup()
    truth = [data._split("test")[i] for i in range(16)]
    said = [caption.removeprefix("label ").partition(", predicted ") for caption in found["samples"]["captions"]]
    assert [label for label, _, _ in said] == [str(label) for _, label in truth]
    for name, (picture, _) in zip(found["samples"]["filenames"], truth, strict=True):
        shown = np.asarray(Image.open(next(folder.glob(f"wandb/offline-run-*/files/{name}"))))
        assert shown.shape[:2] == (96, 96) and np.array_equal(shown.reshape(96, 96, -1)[::12, ::12, 0], picture)
    # what it says of them is what the best weights say
    best = lba_exp.evaluate(folder, quiet=True)
    assert best["forms"]["parallel"]["accuracy"] > 0
    probabilities = [float(prediction.partition("(")[2].rstrip(")")) for _, _, prediction in said]
    assert all(0.1 <= p <= 1 for p in probabilities)


def test_masked_tokens(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    overrides = [*(o for o in LM if not o.startswith("logger")), *corpus, "trainer.max_epochs=1", "parity=off"]
    cfg = lba_exp.compose([*overrides, f"folder={tmp_path / 'run'}"])
    lba_exp.train(cfg, quiet=True)
    found = logged(tmp_path / "run")
    rows = wandb_file.table(tmp_path / "run", found["samples"])
    assert "forms" not in found and len({row["text"] for row in rows}) == 16 < len(rows) <= 64
    data = lba_exp.build.data_module(cfg)
    inputs, labels = (torch.stack(part) for part in zip(*(map(torch.as_tensor, data._split("test")[i]) for i in range(16)), strict=True))
    words, texts = data.spec.class_names, [" ".join(tokens) for tokens in data.shown(inputs)]
    for row in rows:
        sample = texts.index(row["text"])
        assert row["label"] == words[labels[sample, row["position"]]] and row["input"] == words[inputs[sample, row["position"]]]
        assert row["correct"] == (row["prediction"] == row["label"]) and 0 < row["probability"] <= 1
    assert sum(row["input"] == "[MASK]" for row in rows) > len(rows) / 2


def test_labelled_texts():
    """A classifier of texts: what is shown has no padding, and a table with a row a text."""
    spec = SimpleNamespace(class_names=["bad", "good"])
    data = SimpleNamespace(spec=spec, shown=lambda inputs: [[f"w{token}" for token in row] for row in inputs.tolist()])
    trainer = SimpleNamespace(datamodule=data, is_global_zero=True)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    batch = {"inputs": torch.arange(9).reshape(3, 3), "labels": torch.tensor([1, 0, 1]), "padding_mask": mask}
    samples = Samples(samples=2)
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.0], [1.0, 0.0]])
    samples.on_test_batch_end(trainer, None, {"logits": logits, "labels": batch["labels"]}, batch, 0)
    table = tracking._media({}, samples.found, Path("none.png"))["samples"]
    assert [row[:4] for row in table.data] == [["w0 w1", "good", "good", True], ["w3 w4 w5", "good", "bad", False]]
    assert table.data[0][4] == pytest.approx(1 / (1 + np.exp(-2)))
