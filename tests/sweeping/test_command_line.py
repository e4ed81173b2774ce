"""A sweep as it is typed: three models, two seeds; one job fails; all of it is killed. Tables are compared as files."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SWEEP = """# @package _global_
defaults: [override /logger: csv]
plugins: [file_gate]
model: {width: 16, depth: 1, heads: 2}
trainer: {accelerator: cpu, max_epochs: 3}
data: {batch_size: 256}
threads: 1
sweep:
  variants:
    LION-LIT: [model=lion_lit]
    LION-D: [model=lion_d]
    from file: [model=lion_d, model.name=from_file, model.mixer.gate=from_file]
  grid: {seed: [0, 1]}
"""
PLUGIN = '''
import json
from pathlib import Path
import torch
from lba_exp.nn.gates import FixedGate
from lba_exp.registry import GATES

@GATES.register("from_file")
class FileGate(FixedGate):
    """Decays that start where a file for this seed says."""
    def __init__(self, width, heads, init="timescales"):
        super().__init__(width, heads, init)
        with torch.no_grad():
            self.logit.copy_(torch.tensor(json.loads(Path(f"decays_seed{torch.initial_seed()}.json").read_text())))
'''
ROOT = str(Path(__file__).parents[2])
METRICS = "test/accuracy,test/loss,validation/accuracy,validation/loss,parity/recurrent/rel,parity/chunkwise/rel,parameters"


def prepare(folder: Path) -> Path:
    (folder / "sweeps").mkdir(parents=True)
    (folder / "sweeps/three.yaml").write_text(SWEEP)
    (folder / "file_gate.py").write_text(PLUGIN)
    for seed in range(2):
        (folder / f"decays_seed{seed}.json").write_text(f"[{seed}.5, 1.25]")
    return folder


def command(name: str, folder: Path, *arguments: str, **settings) -> dict:
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, "-m", f"lba_exp.commands.{name}", *arguments], "cwd": folder, "env": environment} | settings


def sweep(folder: Path, *arguments: str) -> tuple[int, str]:
    told = subprocess.run(**command("train", folder, "-m", "sweeps=three", *arguments, capture_output=True, text=True, timeout=280))
    return told.returncode, told.stdout + told.stderr


def table(folder: Path, *arguments: str) -> str:
    told = subprocess.run(
        **command("table", folder, "runs", "--metric", METRICS, *arguments, "--format", "csv", capture_output=True, text=True)
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def tables(folder: Path) -> list[str]:
    """Every run alone, and the means with spread and significance; relative times and memory are measured anew, and left out."""
    rows = list(csv.reader(table(folder, "--rows", "row", "--baseline", "LION-D", "--compare", "--spread", "ci95").splitlines()))
    kept = [i for i, name in enumerate(rows[0]) if not name.startswith("relative_")]
    return [table(folder, "--rows", "row,seed"), "\n".join(",".join(row[i] for i in kept) for row in rows)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp("whole"))
    code, screen = sweep(folder, "hydra.launcher.jobs=2")
    assert code == 0 and "6 jobs: 6 done" in screen, screen
    return tables(folder)


@pytest.mark.slow
def test_one_job_fails_and_runs_alone_when_the_cause_is_gone(tmp_path, whole):
    prepare(tmp_path)
    cause = tmp_path / "decays_seed1.json"
    text = cause.read_text()
    cause.unlink()
    code, screen = sweep(tmp_path, "hydra.launcher.jobs=2")
    assert code == 1 and "6 jobs: 5 done, 0 skipped, 1 failed" in screen, screen
    log = (tmp_path / re.findall(r"traceback: (\S+)", screen)[-1]).read_text()
    assert "Traceback (most recent call last)" in log and "FileNotFoundError" in log and "decays_seed1.json" in log
    cells = [row for row in csv.DictReader(table(tmp_path, "--rows", "row").splitlines()) if row["metric"] == "test/accuracy"]
    assert [(row["row"], row["n"], row["runs"], row["failed"]) for row in cells] == [
        ("LION-D", "2", "2", "0"),
        ("LION-LIT", "2", "2", "0"),
        ("from file", "1", "2", "1"),
    ]
    cause.write_text(text)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("seed*/*")}
    code, screen = sweep(tmp_path)
    assert code == 0 and "6 jobs: 1 done, 5 skipped, 0 failed" in screen, screen
    assert before == {p: p.stat().st_mtime_ns for p in before}, "the finished ones are not touched"
    assert tables(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the children of a process from /proc")
def test_a_sweep_killed_with_all_its_processes_ends_in_the_same_table(tmp_path, whole):
    prepare(tmp_path)
    for logged in (3, 5):  # while the third run trains; and, of what goes on from there, the fifth
        with open(tmp_path / "screen", "ab") as screen:
            process = subprocess.Popen(
                **command("train", tmp_path, "-m", "sweeps=three", stdout=screen, stderr=screen, start_new_session=True)
            )
        until = time.monotonic() + 200
        while len(list((tmp_path / "runs/three").glob("*/seed*/metrics.csv"))) < logged:
            assert time.monotonic() < until and process.poll() is None, (tmp_path / "screen").read_text()
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for group in (process.pid, *map(int, children)):  # each job leads a session of its own
            os.killpg(group, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and children
    statuses = [json.loads(p.read_text())["status"] for p in (tmp_path / "runs/three").glob("*/seed*/result.json")]
    assert set(statuses) == {"finished"} and len(statuses) < 6
    code, screen = sweep(tmp_path)
    assert code == 0 and " 0 failed" in screen, screen
    assert tables(tmp_path) == whole
