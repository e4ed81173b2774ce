"""One run: its record, its folder, its logs, and what happens when it fails."""

import json
import math
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import lba_exp
from lba_exp import ops, running
from lba_exp.callbacks.checkpoints import load_checkpoint
from lba_exp.commands import train as command
from lba_exp.errors import ConfigError, DataError, ParityError, RunFolderError, UserError
from lba_exp.ops.fused import operator
from lba_exp.results.metrics_log import read_rows
from lba_exp.tasks.classification import Classification
from tests import wandb_file


def contents(folder: Path) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_record_is_complete(finished):
    folder, record = finished
    stored = json.loads((folder / "result.json").read_text())
    assert stored == json.loads(json.dumps(record))
    assert stored["status"] == "finished" and stored["variant"] == "lion_s" and stored["seed"] == 0
    for split in ("train", "validation", "test"):
        assert 0 <= stored["metrics"][split]["accuracy"] <= 1 and math.isfinite(stored["metrics"][split]["loss"])
    assert stored["best"]["step"] in (5, 10) and stored["parameters"] > 1000 and stored["state_size"] > 0
    efficiency = stored["efficiency"]
    for key in ("tokens_per_second", "step_ms", "peak_memory_bytes", "train_seconds", "wall_seconds"):
        assert efficiency[key] > 0
    forms = stored["parity"]["forms"]
    assert set(forms) == set(ops.MODEL_FORMS)
    for form in ("recurrent", "chunkwise"):
        assert forms[form]["rel"] <= 1e-4 and forms[form]["operator_rel"] <= 2e-5 and forms[form]["agreement"] == 1
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml",
        "overrides.yaml",
        "metrics.csv",
        "run.png",
        "train.log",
        "checkpoints",
        "result.json",
    }
    assert OmegaConf.load(folder / "config.yaml").model.width == 16


def test_the_test_split_is_judged_on_the_best_validation_checkpoint(finished):
    folder, record = finished
    rows = read_rows(folder / "metrics.csv")
    best = max((r for r in rows if "val/accuracy" in r), key=lambda r: (r["val/accuracy"], -r["val/loss"]))
    assert record["best"]["step"] == best["step"] and record["metrics"]["validation"]["accuracy"] == best["val/accuracy"]
    evaluated = lba_exp.evaluate(folder, quiet=True)["forms"]["parallel"]
    assert evaluated["accuracy"] == pytest.approx(record["metrics"]["test"]["accuracy"], abs=1e-6)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(small, finished):
    again = lba_exp.train(lba_exp.compose(small), quiet=True)
    other = lba_exp.train(lba_exp.compose([*small, "seed=1"]), quiet=True)
    assert again["metrics"] == finished[1]["metrics"] != other["metrics"]
    assert again["folder"] != other["folder"] and Path(again["folder"]).parent == Path(other["folder"]).parent


@pytest.mark.parametrize("model", ["lion_lit", "lion_d", "softmax"])
def test_every_preset_trains(small, model):
    record = lba_exp.train(lba_exp.compose([*small, f"model={model}", "trainer.max_epochs=1"]), quiet=True)
    assert record["status"] == "finished" and record["variant"] == model
    assert (record["state_size"] is None) == (model == "softmax")


@pytest.mark.parametrize("debug", ["fast_dev_run", "overfit", "limit"])
def test_debug_presets_run(small, debug):
    epochs = ["trainer.max_epochs=20"] if debug == "overfit" else []
    overrides = [o for o in small if "max_epochs" not in o]
    assert lba_exp.train(lba_exp.compose([*overrides, f"debug={debug}", *epochs]), quiet=True)["status"] == "finished"


def wrong_convention(**operands):
    """The recurrent form with each gate applied one token late."""
    for name in ("forward_log_decay", "backward_log_decay"):
        if operands.get(name) is not None and operands[name].dim() > 1:
            operands[name] = torch.roll(operands[name], 1, dims=1)
    return operands


def diagonal_twice(**operands):
    return operands | {"diagonal_weight": 2.0}


@pytest.fixture(params=[wrong_convention, diagonal_twice])
def planted(request, monkeypatch):
    true = ops.bidirectional_linear_attention

    def operator(q, k, v, forward_log_decay=None, backward_log_decay=None, **options):
        operands = {"forward_log_decay": forward_log_decay, "backward_log_decay": backward_log_decay, **options}
        if options.get("form") == "recurrent":
            operands = request.param(**operands)
        return true(q, k, v, **operands)

    monkeypatch.setattr(ops, "bidirectional_linear_attention", operator)


def test_strict_parity_ends_a_run_with_a_planted_bug(small, planted, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([*small, "parity=strict", "folder=run"])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1, said
    assert "recurrent" in said
    stored = json.loads(Path("run/result.json").read_text())
    assert stored["status"] == "failed" and "recurrent" in stored["error"]
    with pytest.raises(ParityError):
        lba_exp.train(lba_exp.compose([*small, "parity=strict"]), quiet=True)


def test_checked_parity_records_a_planted_bug_and_goes_on(small, planted):
    with pytest.warns(UserWarning, match="recurrent"):
        record = lba_exp.train(lba_exp.compose(small), quiet=True)
    assert record["status"] == "finished"
    assert record["parity"]["verdict"] == "fail" and record["parity"]["forms"]["recurrent"]["rel"] > 1e-4


def test_parity_off_measures_nothing(small):
    record = lba_exp.train(lba_exp.compose([*small, "parity=off"]), quiet=True)
    assert record["parity"] is None
    assert not [k for row in read_rows(Path(record["folder"]) / "metrics.csv") for k in row if k.startswith("parity/")]


def test_a_data_error_leaves_no_folder(small, tmp_path, capsys):
    import datasets

    images = datasets.Dataset.from_dict({"picture": [0, 1], "label": [0, 1]})
    (tmp_path / "data").mkdir()
    images.to_parquet(str(tmp_path / "data" / "train.parquet"))
    before = set(tmp_path.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main([*small, "data=images", f"data.source={tmp_path / 'data'}"])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and "picture" in said and "image" in said
    assert set(tmp_path.iterdir()) == before
    with pytest.raises(DataError):
        lba_exp.train(lba_exp.compose([*small, f"data.source={tmp_path / 'data'}"]), quiet=True)


def test_an_unexpected_error_is_recorded_and_the_next_run_starts_clean(small, monkeypatch):
    cfg = lba_exp.compose([*small, "logger=wandb_offline", "folder=run"])
    with monkeypatch.context() as planted, pytest.raises(ZeroDivisionError):
        planted.setattr(running, "_metrics", lambda *a: 1 / 0)
        lba_exp.train(cfg, quiet=True)
    import wandb

    assert wandb.run is None
    stored = json.loads(Path("run/result.json").read_text())
    assert stored["status"] == "failed" and "ZeroDivisionError" in stored["error"]
    assert "ZeroDivisionError" in Path("run/train.log").read_text()
    assert lba_exp.train(cfg, quiet=True)["status"] == "finished"


def test_peak_memory_is_each_runs_own(small):
    large = lba_exp.train(lba_exp.compose([*small, "model.width=256", "name=large", "trainer.max_epochs=1"]), quiet=True)
    little = lba_exp.train(lba_exp.compose([*small, "name=little", "trainer.max_epochs=1"]), quiet=True)
    assert little["efficiency"]["peak_memory_bytes"] < large["efficiency"]["peak_memory_bytes"]


def test_a_run_without_a_validation_keeps_its_final_weights(small):
    record = lba_exp.train(lba_exp.compose([*small, "trainer.max_steps=3"]), quiet=True)
    assert record["best"]["monitor"].startswith("none")
    assert lba_exp.evaluate(record["folder"], quiet=True)["forms"]["parallel"]["accuracy"] == pytest.approx(
        record["metrics"]["test"]["accuracy"], abs=1e-6
    )


def test_a_run_goes_on_from_a_given_checkpoint(small, finished):
    start = finished[0] / "checkpoints" / "last.ckpt"
    overrides = [o for o in small if "max_epochs" not in o] + ["trainer.max_epochs=3", f"resume={start}", "folder=run"]
    assert lba_exp.train(lba_exp.compose(overrides), quiet=True)["status"] == "finished"
    assert read_rows(Path("run/metrics.csv"))[0]["step"] > 10


def test_a_wrong_starting_point_leaves_no_folder(small, finished):
    torch.save({"a": 1}, "other.pt")
    Path("text.ckpt").write_text("no checkpoint")
    start = finished[0] / "checkpoints" / "last.ckpt"
    for override in (["resume=other.pt"], ["resume=text.ckpt"], [f"resume={start}", "model.width=32"], ["init_from=other.pt"]):
        with pytest.raises(UserError):
            lba_exp.train(lba_exp.compose([*small, *override, "folder=run"]), quiet=True)
        assert not Path("run").exists()


def test_what_lightning_refuses_leaves_no_folder(small, finished):
    for override in (["trainer.devices=0"], ["trainer.val_check_interval=100"], ["trainer.limit_val_batches=0.01"]):
        with pytest.raises(ConfigError, match="trainer"):
            lba_exp.train(lba_exp.compose([*small, *override, "folder=run"]), quiet=True)
        assert not Path("run").exists()


def test_the_fused_form_needs_a_gpu(small, monkeypatch):
    monkeypatch.setattr(operator, "INTERPRETED", False)
    with pytest.raises(ConfigError, match=r"^model.mixer.form: 'fused' runs on CUDA devices .*, got cpu; use 'chunkwise' or 'auto'\.$"):
        lba_exp.train(lba_exp.compose([*small, "model.mixer.form=fused", "folder=run"]), quiet=True)
    assert not Path("run").exists()


def test_a_folder_that_holds_something_else_is_refused(small):
    for name, text in {"result.json": "{}", "metrics.csv": "a,b\n1,x\n", "config.yaml": "a: 1\n", "notes.txt": "mine"}.items():
        Path("mine").mkdir(exist_ok=True)
        (Path("mine") / name).write_text(text)
        for resume in ("auto", "never"):
            with pytest.raises(RunFolderError):
                lba_exp.train(lba_exp.compose([*small, "folder=mine", f"resume={resume}"]), quiet=True)
        assert {p.name: p.read_text() for p in Path("mine").iterdir() if p.name != ".lock"} == {name: text}
        (Path("mine") / name).unlink()


def test_a_debug_run_is_run_each_time(small):
    overrides = [*small, "debug=fast_dev_run"]
    first, second = (lba_exp.train(lba_exp.compose(overrides), quiet=True) for _ in range(2))
    assert "already_finished" not in second and "/debug/" in first["folder"]


def test_a_wandb_run_of_the_users_own_is_left_alone(small):
    import wandb

    with wandb.init(mode="offline", dir=".", settings=wandb.Settings(silent=True, console="off")) as run:
        lba_exp.train(lba_exp.compose([*small, "trainer.max_epochs=1"]), quiet=True)
        assert wandb.run is run
        with pytest.raises(ConfigError, match="W&B"):
            lba_exp.train(lba_exp.compose([*small, "logger=wandb_offline", "folder=run"]), quiet=True)


def test_warnings_reach_the_log_and_threads_are_given_back(small, planted):
    threads = torch.get_num_threads()
    with pytest.warns(UserWarning, match="recurrent"):
        record = lba_exp.train(lba_exp.compose([*small, "trainer.max_epochs=1"]), quiet=True)
    assert "recurrent" in (Path(record["folder"]) / "train.log").read_text()
    assert torch.get_num_threads() == threads


def test_weights_can_start_another_run(small, finished):
    best = finished[0] / "checkpoints" / "best.ckpt"
    record = lba_exp.train(lba_exp.compose([*small, f"init_from={best}", "optim.lr=1e-9", "trainer.max_epochs=1"]), quiet=True)
    assert record["metrics"]["test"]["accuracy"] == pytest.approx(finished[1]["metrics"]["test"]["accuracy"], abs=0.01)
    with pytest.raises(ConfigError, match="another model"):
        lba_exp.train(lba_exp.compose([*small, f"init_from={best}", "model.width=32"]), quiet=True)


def test_accumulation_and_precision_come_from_the_trainer(small):
    overrides = ["trainer=bf16", *small, "trainer.accumulate_grad_batches=2", "trainer.max_epochs=1"]
    record = lba_exp.train(lba_exp.compose(overrides), quiet=True)
    assert record["environment"]["precision"] == "bf16-mixed"
    assert record["best"]["step"] == 3  # 5 batches in steps of 2
    assert record["parity"]["forms"]["recurrent"]["rel"] <= 1e-4


def test_a_run_without_checkpoints(small):
    record = lba_exp.train(lba_exp.compose([*small, "trainer.enable_checkpointing=false", "folder=run"]), quiet=True)
    assert record["status"] == "finished" and record["best"]["monitor"] == "none: the final weights"
    assert not Path("run/checkpoints").exists()


def test_ctrl_c_is_recorded_in_the_folder_and_in_wandb(small, monkeypatch):
    true = Classification.training_step

    def interrupted(task, batch, batch_idx):
        if task.global_step == 7:
            raise KeyboardInterrupt
        return true(task, batch, batch_idx)

    cfg = lba_exp.compose([*small, "logger=wandb_offline", "folder=run"])
    with monkeypatch.context() as planted, pytest.raises(KeyboardInterrupt):
        planted.setattr(Classification, "training_step", interrupted)
        lba_exp.train(cfg, quiet=True)
    assert json.loads(Path("run/result.json").read_text())["status"] == "interrupted"
    assert wandb_file.read(Path("run"))[2] == 1
    assert lba_exp.train(cfg, quiet=True)["status"] == "finished"
    assert [row["step"] for row in read_rows(Path("run/metrics.csv"))] == [5, 10]
    before, after = wandb_file.runs(Path("run"))  # the resumed run is the same one on W&B
    assert before.run_id == after.run_id == Path("run/wandb_id").read_text()
    assert [wandb_file.read(Path("run"), i)[2] for i in range(2)] == [1, 0]
    steps = [[row["trainer/global_step"] for row in wandb_file.read(Path("run"), i)[1] if "val/loss" in row] for i in range(2)]
    assert steps == [[5], [10]]


def test_the_readmes_variant_trains(small):
    """The three steps of README.md, as they stand there."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    steps = text[text.index("## Add a variant") :]
    blocks = {language: textwrap.dedent(code) for language, code in re.findall(r"```(\w+)\n(.*?)```", steps, re.S)}
    name = re.search(r"Write `(\w+)\.py`", text).group(1)
    Path(f"{name}.py").write_text(blocks["python"])
    Path("experiments").mkdir()
    Path("experiments/digits_frozen.yaml").write_text(blocks["yaml"])
    with pytest.raises(SystemExit) as stop:
        command.main(["experiments=digits_frozen", "parity=strict", *small, "trainer.max_epochs=1", "folder=run"])
    assert stop.value.code == 0
    gates = {k: v for k, v in load_checkpoint(Path("run/checkpoints/best.ckpt"))["state_dict"].items() if k.endswith("gate.logit")}
    start = sys.modules[name].FrozenGate(16, 2).logit
    assert gates and all(torch.equal(value, start) for value in gates.values())
