"""lba-item: tables of the index, runs that become records, and the runs that an item needs."""

import json
from functools import cache
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from lba_exp.commands import item as command
from lba_exp.results.items import read_items
from lba_exp.sweeping import plan as planning


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        command.main(list(map(str, arguments)))
    return stop.value.code


@pytest.fixture
def results(monkeypatch) -> Path:
    """Items of one's own, in the working folder."""
    folder = Path("experiments/results")
    folder.mkdir(parents=True)
    rows = {"full": 77.5, "fixed decay": None}
    mine = {"paper": "a table", "sweep": "digits_small", "rows": rows, "baseline": "full", "search": {"optim.lr": [4e-3]}}
    entries = {"mine": mine, "figure": {"paper": "a figure", "command": "lba-bench steps"}}
    entries["tuned"] = {"paper": "p", "sweep": "glue_m2", "needs": ["init_from"], "rows": {"mnli": None}}
    entries["text"] = {"paper": "p", "sweep": "text_mlm_positions", "runs": [["data.source=@corpus"]], "rows": {"lion_s": None}}
    (folder / "items.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    return folder


@cache
def composed(row: str, *overrides: str) -> dict:
    (job,) = planning.plan(["sweeps=digits_small", f"sweep.only=[{row}]", "seed=0", *overrides]).jobs
    return OmegaConf.to_container(job.cfg, resolve=True)


def run_folder(folder: Path, row: str, seed: int, accuracy: float, *overrides: str) -> None:
    """A finished run as started by itself, without the sweep: its record names no row."""
    config = composed(row, *overrides) | {"seed": seed}
    config["origin"] = {"experiment": "digits_lion_s", "sweep": None, "row": None, "overrides": []}
    config |= {"folder": "/somewhere/else", "name": "mine", "threads": 1}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.csv").write_text("step,epoch,train/step_loss,val/accuracy,val/loss\n10,0,2.0,,\n20,0,,0.5,1.0\n")
    metrics = {"test": {"accuracy": accuracy}, "validation": {"accuracy": accuracy}}
    record = {"status": "finished", "variant": "lion_s", "data": "digits", "seed": seed, "row": None, "sweep": None, "metrics": metrics}
    record |= {"folder": "/somewhere/else", "parameters": 3516, "began": "2026-12-01T10:00:00", "decays": {"x": [0.123456789] * 5_000}}
    (folder / "result.json").write_text(json.dumps(record))


def test_an_unknown_item_is_one_sentence_with_the_valid_ones(capsys):
    assert call("table", "digits_smal") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "did you mean digits_small?" in said and "fashion_mnist_decay" in said
    assert call("table", "") == 1


def test_the_list_and_a_table_without_records(capsys):
    assert call("list") == 0 and call("table", "digits_small") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in read_items(command.results_folder())) and "Not yet run" in said


def test_runs_become_records_and_a_table(results, capsys):
    for seed in range(3):
        run_folder(Path(f"runs/full{seed}"), "full", seed, 0.8)
        run_folder(Path(f"runs/fixed{seed}"), "fixed decay", seed, 0.7)
    run_folder(Path("runs/other"), "full", 0, 0.1, "model.width=32")
    run_folder(Path("runs/none"), "no decay", 0, 0.6)  # a row of the sweep, not of the item
    assert call("collect", "mine", "runs") == 0
    said = capsys.readouterr().out
    assert "7 records written" in said and "Left out: 1 run that" in said
    path = results / "digits_small" / "fixed_decay-lr0.002-seed1.json"
    content = json.loads(path.read_text())
    assert content["result"]["row"] == "fixed decay" and content["result"]["sweep"] == "digits_small"
    assert content["curve"] == [{"step": 20, "epoch": 0, "val/accuracy": 0.5, "val/loss": 1.0}]
    assert "somewhere" not in path.read_text() and "decays" not in content["result"]  # too many numbers
    assert call("table", "mine") == 0
    table = capsys.readouterr().out
    assert "77.50" in table and "80.00 ± 0.00" in table and "−10.00" in table and "no decay" not in table
    assert call("collect", "mine", "runs") == 0 and "0 records written, 7" in capsys.readouterr().out


def test_records_are_not_lost_unless_it_is_said(results, capsys):
    run_folder(Path("runs/a"), "full", 0, 0.8)
    assert call("collect", "mine", "runs/a") == 0
    run_folder(Path("runs/b"), "full", 0, 0.9)
    assert call("collect", "mine", "runs/b") == 1 and "--replace" in capsys.readouterr().err
    assert call("collect", "mine", "runs/b", "--replace") == 0
    assert "0.9" in (results / "digits_small" / "full-lr0.002-seed0.json").read_text()
    assert call("collect", "mine", "runs") == 1 and "give the folder of one of them" in capsys.readouterr().err


def test_runs_of_another_recipe_are_refused_unless_it_is_said(results, capsys):
    run_folder(Path("runs/a"), "full", 0, 0.8, "model.depth=2")
    assert call("collect", "mine", "runs") == 1
    said = capsys.readouterr().err
    assert "no finished run" in said and "model.depth (2, not 3)" in said
    assert call("collect", "mine", "runs", "--with", "model.depth=2") == 0


def test_reproducing_is_the_sweep_the_search_and_what_the_choice_lacks(results, monkeypatch, capsys):
    said = []

    def trained(module, arguments, may_fail=True):
        said.append((module.rpartition(".")[2], *arguments))
        if len(said) == 2:  # both are done
            root = Path("runs/reproduced/digits_small")
            for seed in range(3):
                run_folder(root / f"full{seed}", "full", seed, 0.8)
                run_folder(root / f"fixed{seed}", "fixed decay", seed, 0.7)
            run_folder(root / "searched", "full", 0, 0.9, "optim.lr=0.004")
            run_folder(root / "worse", "fixed decay", 0, 0.6, "optim.lr=0.004")
        return 0

    monkeypatch.setattr(command, "_run", trained)
    assert call("reproduce", "mine", "--jobs", 2, "threads=1") == 0
    first, second, third = said
    assert first[:3] == ("train", "-m", "sweeps=digits_small") and "threads=1" in first and "hydra.launcher.jobs=2" in first
    assert 'sweep.only=["full", "fixed decay"]' in first and second == (*first, "seed=0", "optim.lr=0.004")
    assert 'sweep.only=["full"]' in third and {"seed=1,2", "optim.lr=0.004", "threads=1"} <= set(third)
    assert "| 0.004" in capsys.readouterr().out and not (results / "digits_small").exists()


def test_what_an_item_needs(results, monkeypatch, capsys):
    assert call("reproduce", "figure") == 1 and "lba-bench steps" in capsys.readouterr().err
    assert call("collect", "figure", ".") == 1 and "lba-bench steps" in capsys.readouterr().err
    assert call("reproduce", "tuned") == 1 and "init_from=" in capsys.readouterr().err
    said = []
    monkeypatch.setattr(command.subprocess, "run", lambda arguments: said.append(arguments) or type("Done", (), {"returncode": 1}))
    assert call("reproduce", "text", "--data", "prepared") == 1  # the data could not be had: nothing is trained
    assert len(said) == 1 and said[0][2:] == ["lba_exp.commands.data", "prepare", "corpus", "prepared/corpus"]


def test_an_unknown_flag_keeps_exit_code_2():
    assert call("table", "mine", "--nothing") == 2 and call("reproduce", "mine", "--nothing") == 2


def test_the_index_is_rewritten_between_its_marks(results, capsys):
    page = Path("experiments/PAPER_INDEX.md")
    assert call("index") == 1
    page.write_text("nothing\n")
    assert call("index") == 1 and "does not hold" in capsys.readouterr().err
    page.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n")
    assert call("index") == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "a figure" in text and "full 77.5" in text and "old" not in text
