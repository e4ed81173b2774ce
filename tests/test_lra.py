"""Long Range Arena through its experiments: sizes as published, a few steps of each on tiny data, two towers from training to lba-eval."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import lba_exp
from lba_exp import evaluating
from lba_exp.callbacks.checkpoints import load_checkpoint
from lba_exp.errors import ConfigError, ParityError
from lba_exp.ops import api
from tests import lra

ROOT = Path(__file__).parents[1]
TINY = ["model.width=8", "model.depth=1", "model.heads=2", "trainer.accelerator=cpu", "logger=csv", "threads=1", "parity=strict"]
SHORT = ["trainer.max_epochs=-1", "trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
# layers, width, batch, epochs of S5 (arXiv 2208.04933, appendix), and dropout
SIZES = {
    "listops": (8, 128, 50, 40, 0.0),
    "text": (6, 256, 50, 35, 0.1),
    "retrieval": (6, 128, 32, 20, 0.0),
    "image": (6, 512, 50, 250, 0.1),
    "image_fashion_mnist": (6, 512, 50, 250, 0.1),
    "pathfinder": (6, 192, 64, 200, 0.0),
    "pathx": (6, 128, 32, 75, 0.0),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each experiment's data: in the benchmark's own folders, as tables, and as the hub's files."""
    root, rng = tmp_path_factory.mktemp("lra"), np.random.default_rng(0)
    lra.write_listops(root / "listops")
    lra.write_aan(root / "retrieval", 64)
    lra.write_pathfinder(root / "pathfinder", size=8)
    (root / "pathx").symlink_to(root / "pathfinder")
    (root / "text").mkdir()
    for split in ("train", "test"):
        with open(root / "text" / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *(("good" if row % 2 else "bad film", row % 2) for row in range(20))])
    for name, column, shape in (("image", "img", (32, 32, 3)), ("image_fashion_mnist", "image", (28, 28))):
        (root / name).mkdir()
        features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(num_classes=2)})
        for split in ("train", "test"):
            found = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(20)]
            table = datasets.Dataset.from_dict({column: found, "label": [0, 1] * 10}, features=features)
            table.to_parquet(str(root / name / f"{split}.parquet"))
    return root


@pytest.mark.parametrize("task", SIZES)
def test_the_experiments_have_the_published_sizes(folders, task):
    cfg = lba_exp.compose([f"experiments=lra_{task}", f"data.source={folders}"])
    assert (cfg.model.depth, cfg.model.width, cfg.data.batch_size, cfg.trainer.max_epochs, cfg.model.dropout) == SIZES[task]
    assert (cfg.optim.lr, cfg.optim.label_smoothing, cfg.optim.final_fraction) == (5e-4, 0, 0)
    assert cfg.model.mixer.dt_min == (1e-4 if task == "pathx" else 1e-3) and cfg.model.mixer.gate_init == "hippo"
    assert (cfg.data.max_length if task in ("text", "retrieval") else None) == {"text": 4_096, "retrieval": 4_000}.get(task)


@pytest.mark.parametrize("task", SIZES)
def test_the_first_steps_of_every_experiment(folders, task):
    run = [f"experiments=lra_{task}", f"data.source={folders / task}", "data.batch_size=4", "data.eval_batch_size=4", "folder=run"]
    record = lba_exp.train(lba_exp.compose([*run, *TINY, *SHORT]), quiet=True)
    assert record["status"] == "finished" and record["parity"]["verdict"] == "pass"
    assert record["parity"]["forms"]["recurrent"]["rel"] < 1e-4 and record["samples"]["train"] >= 8
    assert record["length"] == {"listops": 1_999, "text": 4_096, "retrieval": 4_000, "pathfinder": 64, "pathx": 64}.get(task, 1_024)


PAIRS = ["experiments=lra_retrieval", "data.batch_size=8", "data.eval_batch_size=8", "data.max_length=48", "optim.lr=1e-2", "folder=run"]


def test_two_towers_learn_and_every_form_says_the_same(folders):
    """The recurrent form pair by pair, without padding, is the judge; the labels say whether both texts are of one letter."""
    run = [*PAIRS, f"data.source={folders / 'retrieval'}", *TINY, "trainer.max_epochs=12", "model.width=16"]
    cfg = lba_exp.compose(run)
    record = lba_exp.train(cfg, quiet=True)
    assert record["metrics"]["test"]["accuracy"] > 0.95 and record["parity"]["verdict"] == "pass"
    assert {"recurrent", "parallel"} <= record["parity"]["forms"].keys() and record["parity"]["forms"]["recurrent"]["count"] == 64
    data = lba_exp.build.data_module(cfg)
    model = evaluating.load_model(Path("run"), cfg, data, load_checkpoint(Path("run/checkpoints/best.ckpt")))
    model.set_form("recurrent")
    right = 0
    for row in range(64):
        tokens, second, label = data._split("test")[row]
        with torch.no_grad():
            a, b = (model.encode(torch.from_numpy(text)[None]) for text in (tokens[:second], tokens[second:]))
            right += int(model.head(torch.cat([a, b, a * b, a - b], -1)).argmax()) == label
    assert right / 64 == record["metrics"]["test"]["accuracy"]
    evaluated = lba_exp.evaluate("run")["forms"]
    assert evaluated["recurrent"]["accuracy"] == evaluated["chunkwise"]["accuracy"] == record["metrics"]["test"]["accuracy"]


def test_a_planted_bug_in_two_towers_is_caught(folders, monkeypatch):
    """The recurrent form with each token's decays applied one token late."""
    right = api._IMPLEMENTATIONS["recurrent"]
    late = lambda q, k, v, forward, backward, **options: right(q, k, v, forward.roll(1, dims=1), backward, **options)  # noqa: E731
    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", late)
    with pytest.raises(ParityError, match="form recurrent"):
        lba_exp.train(lba_exp.compose([*PAIRS, f"data.source={folders / 'retrieval'}", *TINY, *SHORT]), quiet=True)


def test_a_pair_that_is_no_pair_is_one_sentence(folders):
    with pytest.raises(ConfigError, match="two_towers reads pairs of texts: name the second one's column"):
        lba_exp.compose([*PAIRS, f"data.source={folders / 'retrieval'}", "data.second_text_column=null"])


@pytest.mark.slow  # 14 s, most of it two imports of lightning
def test_the_table_goes_on_where_a_task_fails(folders, tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "lra_table.py"), "out", f"image={folders / 'text'}", f"text={folders / 'text'}"]
    command += ["--steps", "20", "--", *TINY, "data.batch_size=4", "data.eval_batch_size=4", "trainer.max_time=null"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    table = (tmp_path / "out" / "table.md").read_text()
    assert done.returncode == 1 and done.stdout.endswith(table), done.stderr
    _, _, failed, trained = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert failed[0] == "image" and failed[5] == "failed (exit code 1), see above" and "is not a column" in done.stderr
    record = json.loads((tmp_path / "out" / "text" / "result.json").read_text())
    assert trained[2] == "18 / 2 / 20" and trained[3] == "4,096" and trained[5] == "20" and trained[-1] == "pass"
    assert float(trained[6]) == pytest.approx(1_000 / record["efficiency"]["step_ms"], abs=0.01) and float(trained[7]) > 0
