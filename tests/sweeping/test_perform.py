"""Sweeps that run: a failed job, an interrupted sweep, a killed one, jobs side by side, launchers of Hydra's."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from lba_exp.results.collect import collect
from lba_exp.sweeping import local
from tests import forked
from tests.conftest import SMALL

TIMED = ("efficiency", "began", "folder", "latency_ms", "peak_bytes", "environment", "git")
SWEEP = """# @package _global_
plugins: [my_gates]
sweep:
  variants:
    learned: [model.mixer.gate=fixed]
    none: [model.mixer.gate=none]
    fragile: [model.mixer.gate=fragile]
  grid: {seed: [0, 1]}
"""
PLUGIN = """
from pathlib import Path
import torch
from lba_exp.nn.gates import FixedGate
from lba_exp.registry import GATES

@GATES.register("fragile")
class Fragile(FixedGate):
    def __init__(self, width, heads, init="timescales"):
        if Path("cause").exists() and torch.initial_seed() == 1:
            raise RuntimeError("the cause is there")
        super().__init__(width, heads, init)
"""


def prepare(folder: Path) -> list[str]:
    """A folder with the sweep above; returns its command line. Without parity checks, which take half of so short a job's time."""
    (folder / "sweeps").mkdir(parents=True)
    (folder / "sweeps" / "mine.yaml").write_text(SWEEP)
    (folder / "my_gates.py").write_text(PLUGIN)
    return ["-m", "sweeps=mine", *SMALL, "parity=off"]


def summary(folder: Path) -> dict:
    return json.loads((folder / "runs/mine/.sweep/summary.json").read_text())


def untimed(value):
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMED}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def table(folder: Path) -> dict:
    """Every record of the sweep, without times and places."""
    paths = sorted((folder / "runs/mine").glob("*/seed*/result.json"))
    return {str(p.relative_to(folder)): untimed(json.loads(p.read_text())) for p in paths}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, screen = forked.sweep(folder, prepare(folder))
    assert code == 0, screen
    return folder


def test_a_failed_job_stops_no_other_and_is_run_again_alone(tmp_path, uninterrupted):
    arguments = prepare(tmp_path)
    (tmp_path / "cause").touch()
    code, screen = forked.sweep(tmp_path, arguments)
    assert code == 1 and "6 jobs: 5 done, 0 skipped, 1 failed" in screen, screen
    log = re.search(r"traceback: (\S+)", screen)[1]
    assert "RuntimeError: the cause is there" in (tmp_path / log).read_text() and "Traceback" in (tmp_path / log).read_text()
    told = summary(tmp_path)
    assert told["counts"]["failed"] == 1
    assert [job["row"] for job in told["jobs"] if job["status"] == "failed"] == ["fragile"]
    # it left no run folder, and is no blank for tables
    failed = [run for run in collect([tmp_path / "runs"])[0] if run.status != "finished"]
    assert [(run.status, run.label("row"), run.label("model.mixer.gate"), run.label("seed")) for run in failed] == [
        ("failed", "fragile", "fragile", "1")
    ]
    assert failed[0].error == "RuntimeError: the cause is there" and failed[0].log.resolve() == (tmp_path / log).resolve()

    before = {p: p.read_bytes() for p in (tmp_path / "runs/mine").glob("*/seed*/result.json")}
    (tmp_path / "cause").unlink()
    code, screen = forked.sweep(tmp_path, arguments)
    assert code == 0 and "6 jobs: 1 done, 5 skipped, 0 failed" in screen, screen
    assert all(p.read_bytes() == content for p, content in before.items() if b'"finished"' in content)
    assert table(tmp_path) == table(uninterrupted) and len(table(tmp_path)) == 6
    code, screen = forked.sweep(tmp_path, arguments)
    assert code == 0 and "0 done, 6 skipped, 0 failed" in screen
    assert [(run.status, run.record["row"]) for run in collect([tmp_path / "runs"])[0]] == [
        ("finished", row) for row in ("fragile", "learned", "none") for _ in range(2)
    ]
    assert not (tmp_path / "multirun").exists() and sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["mine"]


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_sweep_started_again_ends_as_an_uninterrupted_one(tmp_path, uninterrupted, at):
    arguments = prepare(tmp_path)
    process = forked.start_sweep(tmp_path, arguments)
    wait_for(lambda: len(list((tmp_path / "runs/mine").glob("*/seed*/result.json"))) >= at)
    time.sleep(0.3)  # somewhere in the next job
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    there = [run.status for run in collect([tmp_path / "runs"])[0]]
    assert len(there) == 6 and "missing" in there, "what has not begun is told"
    code, screen = forked.sweep(tmp_path, arguments)
    assert code == 0, screen
    assert table(tmp_path) == table(uninterrupted)


def test_ctrl_c_interrupts_the_job_and_says_what_is_left(tmp_path, uninterrupted):
    arguments = prepare(tmp_path)
    process = forked.start_sweep(tmp_path, arguments)
    wait_for(lambda: list((tmp_path / "runs/mine").glob("*/seed*/metrics.csv")))
    os.kill(process.pid, signal.SIGINT)
    process.join()
    told = summary(tmp_path)
    assert process.exitcode == 130 and told["counts"]["interrupted"] == 1 and told["counts"]["not started"] >= 4
    code, screen = forked.sweep(tmp_path, [*arguments, "hydra.launcher.jobs=2"])
    assert code == 0, screen
    assert table(tmp_path) == table(uninterrupted)


def test_gpus_and_threads_are_shared_among_jobs_side_by_side(monkeypatch):
    import lba_exp

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    one, two = lba_exp.compose(["trainer=gpu"]), lba_exp.compose(["trainer=gpu", "trainer.devices=2"])
    assert [local.share(one, slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["4", "6", "7", "4"]
    assert local.share(two, 1, 2)["CUDA_VISIBLE_DEVICES"] == "7,4"
    assert local.share(one, 0, 3)["OMP_NUM_THREADS"] == "4"
    assert "CUDA_VISIBLE_DEVICES" not in local.share(lba_exp.compose(["trainer=cpu"]), 0, 3)
    assert not {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"} & local.share(one, 0, 1).keys()


def wait_for(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.05)
