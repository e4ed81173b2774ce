"""Runs on several machines, as far as their processes can tell: started as torchrun and Slurm do, on this one."""

import json
import os
import signal
from pathlib import Path

import pytest

from lba_exp.callbacks.checkpoints import load_checkpoint
from tests import forked
from tests.test_many_devices import RUN, alone, curve, finished, same  # noqa: F401

pytestmark = pytest.mark.slow
MANY = [*RUN, "trainer.strategy=ddp"]


@pytest.mark.parametrize("launcher", [forked.torchrun, forked.srun])
def test_two_nodes_make_one_run(tmp_path, alone, launcher):  # noqa: F811
    record = finished(forked.run_on_many(tmp_path, [*MANY, "logger=wandb_offline"], nodes=2, launcher=launcher))
    same(curve(tmp_path), curve(alone[0]))
    assert record["batch"] == {"per_device": 129, "devices": 2, "accumulated": 1, "global": 258}
    assert len(list(tmp_path.rglob("result.json"))) == len(list(tmp_path.rglob("*.wandb"))) == 1


@pytest.mark.parametrize("launcher", [forked.torchrun, forked.srun])
def test_a_launcher_that_started_something_else_is_one_sentence(tmp_path, launcher):
    several = [*MANY, "trainer.num_nodes=3"]
    answers = forked.run_on_many(tmp_path, several, nodes=2, launcher=launcher, overrule=["trainer.num_nodes=3"])
    assert {answer[0] for _, answer in answers} == {"error"} and "num_nodes=" in answers[0][1][1], answers


@pytest.mark.parametrize("struck", [None, 1], ids=["all tasks", "the second task alone"])
def test_slurms_signal_to_any_task_puts_the_job_back_once(tmp_path, alone, struck):  # noqa: F811
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    kill = (struck, ("on_train_batch_start", 6))
    slurm = {"nodes": 2, "launcher": forked.srun}
    answers = forked.run_on_many(tmp_path, MANY, kill=kill, number=signal.SIGUSR1, environment=path, **slurm)
    assert "stopped by SIGUSR1 after step 7, which is saved" in answers[0][1][1], answers
    assert load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 7
    assert json.loads(Path("run/result.json").read_text())["status"] == "interrupted"
    [call] = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("requeue 1234")
    finished(forked.run_on_many(tmp_path, MANY, **slurm))
    same(curve(tmp_path), curve(alone[0]))
