"""Runs are found and read, whatever state their folders are in."""

import json

import pytest

from lba_exp.errors import UserError
from lba_exp.results.collect import check_keys, collect, metric_name, read_run, select
from tests.run_folders import config, write_run


def test_runs_are_found_at_any_depth_and_once(tmp_path):
    folder = write_run(tmp_path / "a" / "b", seed=0)
    write_run(tmp_path / "c", seed=1)
    inside = folder / "wandb" / "files"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("model: {}")
    aside = folder.with_name("seed0.aside1")
    aside.mkdir()
    (aside / "config.yaml").write_text((folder / "config.yaml").read_text())
    runs, remarks = collect([tmp_path, folder, tmp_path / "c"])
    assert [run.label("seed") for run in runs] == ["0", "1"] and remarks == []
    assert len(collect([aside])[0]) == 1, "named itself, it counts"


def test_debug_runs_are_left_out_unless_named(tmp_path):
    write_run(tmp_path, seed=0)
    folder = write_run(tmp_path, seed=1, origin__debug="overfit")
    runs, remarks = collect([tmp_path])
    assert len(runs) == 1 and remarks == ["Left out: 1 run of debug=."]
    assert len(collect([folder])[0]) == 1


def test_what_is_wrong_with_a_folder_is_its_status(tmp_path):
    broken = write_run(tmp_path, seed=0)
    (broken / "result.json").write_text('{"status": "fini')
    other = write_run(tmp_path, seed=1)
    (other / "result.json").write_text("[1, 2]")
    odd = write_run(tmp_path, seed=2)
    (odd / "config.yaml").write_text("a: [1")
    write_run(tmp_path, seed=3, status="failed")
    write_run(tmp_path, seed=4, status="unfinished")
    write_run(tmp_path, seed=5, accuracy=float("nan"))
    runs = collect([tmp_path])[0]
    assert [run.status for run in runs] == ["unreadable", "unreadable", "unreadable", "failed", "unfinished", "finished"]
    assert [run.error for run in runs][:4] == [
        "result.json cannot be read",
        "result.json is not a run's record",
        "config.yaml cannot be read",
        "ValueError: it broke",
    ]
    assert "no result.json" in runs[4].error and runs[4].label("model") == "lion_s" and runs[4].label("data") == "digits"
    assert runs[5].numbers["test/accuracy"] is None


@pytest.mark.parametrize("content", ["null", "model: 3", "model: {}", "[]", "", "model: {name: x}\norigin: 4", "\x00"])
def test_any_configuration_is_survived(tmp_path, content):
    folder = write_run(tmp_path)
    (folder / "config.yaml").write_text(content)
    run = read_run(folder)
    assert run.status in ("finished", "unreadable") and run.numbers is not None
    (folder / "result.json").unlink()
    assert read_run(folder).status in ("unfinished", "unreadable")


@pytest.mark.parametrize("part", ["metrics", "parity", "efficiency", "environment", "decays"])
def test_a_record_of_another_shape_is_survived(tmp_path, part):
    folder = write_run(tmp_path)
    record = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(record | {part: ["other", 1]}))
    run = read_run(folder)
    assert run.status == "finished" and run.label("model") == "lion_s"


def test_labels_come_from_record_and_configuration(tmp_path):
    run = read_run(write_run(tmp_path, model="lion_d", seed=3, record__row="no decay", optim__lr=1e-3))
    labels = {
        key: run.label(key) for key in ("model", "task", "seed", "row", "optim.lr", "model.mixer.gate", "experiment", "environment.device")
    }
    assert labels == {
        "model": "lion_d",
        "task": "classification",
        "seed": "3",
        "row": "no decay",
        "optim.lr": "0.001",
        "model.mixer.gate": "selective",
        "experiment": "none",
        "environment.device": "cpu (x86_64)",
    }


def test_metrics_go_by_short_names(tmp_path):
    runs = [read_run(write_run(tmp_path))]
    names = ("test.accuracy", "val/loss", "wall_seconds", "parity/recurrent/rel", "parameters")
    assert [metric_name(name, runs) for name in names] == [
        "test/accuracy",
        "validation/loss",
        "efficiency/wall_seconds",
        "parity/recurrent/rel",
        "parameters",
    ]
    with pytest.raises(UserError, match=r"'test/acuracy' is not a metric of these runs; did you mean test/accuracy\?.*Valid: "):
        metric_name("test/acuracy", runs)


def test_refusals_name_what_is_valid(tmp_path):
    write_run(tmp_path, model="lion_s")
    write_run(tmp_path, model="lion_d")
    runs = collect([tmp_path])[0]
    with pytest.raises(UserError, match=r"did you mean optim.lr\?"):
        check_keys(["optm.lr"], runs, "--rows")
    with pytest.raises(UserError, match="leaves no run: model is lion_d, lion_s here"):
        select(runs, ["model=softmax"])
    with pytest.raises(UserError, match="write key=value"):
        select(runs, ["model"])
    with pytest.raises(UserError, match="is no folder"):
        collect([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run lies in or below"):
        collect([tmp_path / "empty"])
    assert [run.label("model") for run in select(runs, ["model=lion_d,softmax", "seed=0"])] == ["lion_d"]


def test_jobs_of_a_sweep_without_a_folder_count_wherever_it_was_moved_to(tmp_path):
    write_run(tmp_path / "before", seed=0)
    group = tmp_path / "before" / "digits"
    kept = group / ".sweep"
    (kept / "logs").mkdir(parents=True)
    (kept / "logs" / "b.log").write_text("Traceback")
    jobs = {"lion_s/seed0": "done", "lion_s/seed1": "failed", "lion_s/seed2": "not started", "lion_s/seed3": "running", "lion_s/x": "done"}
    told = [{"label": label, "status": status} for label, status in jobs.items()]
    told[1] |= {"error": "OSError: no file", "log": str(kept / "logs" / "b.log")}
    (kept / "summary.json").write_text(json.dumps({"jobs": told}))
    (kept / "configs.json").write_text(json.dumps({f"lion_s/seed{i}": config(seed=i) for i in range(4)}))
    (tmp_path / "before").rename(tmp_path / "after")
    runs = collect([tmp_path, tmp_path / "after"])[0]
    statuses = [(run.label("seed"), run.status) for run in runs]
    assert statuses == [("0", "finished"), ("1", "failed"), ("2", "missing"), ("3", "missing")]
    assert runs[1].error == "OSError: no file" and runs[1].log == tmp_path / "after/digits/.sweep/logs/b.log"
    assert runs[2].label("optim.lr") == "0.002" and runs[2].label("model") == "lion_s" and runs[2].log is None
    for content in ("[", "[]", '{"jobs": [1]}', '{"jobs": [{"label": 3, "status": 4}]}'):
        (tmp_path / "after/digits/.sweep/summary.json").write_text(content)
        assert len(collect([tmp_path])[0]) == 1
