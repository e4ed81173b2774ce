"""Hydra's other launchers under a sweep of ours: joblib, and Slurm through submitit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SMALL

COMMAND = [sys.executable, "-m", "lba_exp.commands.train", "-m", "seed=0,1", *SMALL, "trainer.max_epochs=1"]


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"} if path else {}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=280)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"], []],
    ids=["joblib", "submitit_local", "local"],
)
def test_every_launcher_runs_the_jobs_and_tells_how_they_ended(launcher):
    done = run(*launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 jobs: 2 done, 0 skipped, 0 failed" in done.stdout
    assert [json.loads(p.read_text())["status"] for p in Path("runs/digits").glob("*/seed*/result.json")] == ["finished"] * 2
    done = run(*launcher)
    assert done.returncode == 0 and "0 done, 2 skipped, 0 failed" in done.stdout
    done = run(*launcher, "trainer.limit_val_batches=0.0001")  # what only Lightning can refuse
    assert done.returncode == 1 and "2 failed" in done.stdout, done.stdout + done.stderr


def test_the_batch_script_for_slurm_says_what_was_asked(tmp_path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in {"srun": "exit 0", "sbatch": f'cp "${{@: -1}}" {tmp_path}/script; echo "no such partition" >&2; exit 1'}.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    asked = ("timeout_min=90", "gpus_per_node=1", "partition=long", "cpus_per_task=8")
    done = run("hydra/launcher=submitit_slurm", *(f"hydra.launcher.{a}" for a in asked), path=bin_folder)
    script = (tmp_path / "script").read_text()
    for line in ("--array=0-1", "--time=90", "--gpus-per-node=1", "--partition=long", "--cpus-per-task=8", "--job-name=lba_exp"):
        assert re.search(rf"^#SBATCH {re.escape(line)}", script, re.M), script
    assert sys.executable in script and "submitit.core._submit" in script and str(tmp_path / "runs/digits/.sweep") in script
    assert done.returncode == 1 and "2 failed" in done.stdout and "the launcher submitit_slurm failed" in done.stdout
