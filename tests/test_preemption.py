"""A run that is asked to end saves the step it is at, ends, and goes on to the same numbers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lba_exp.callbacks.checkpoints import load_checkpoint
from lba_exp.commands import train as command
from lba_exp.results.metrics_log import read_rows
from lba_exp.tasks.classification import Classification
from tests import forked, wandb_file
from tests.conftest import SMALL

RUN = [*SMALL, "model.dropout=0.1", "trainer.log_every_n_steps=1", "folder=run"]


def untimed(folder):
    return [{k: v for k, v in r.items() if not any(t in k for t in ("efficiency/", "latency"))} for r in read_rows(folder / "metrics.csv")]


@pytest.fixture
def asked(monkeypatch):
    """Has the run's own process ask itself to end, in a method of the task, at an optimizer step."""

    def ask(method, step, number=signal.SIGTERM):
        true = getattr(Classification, method)

        def then(task, *arguments):
            if task.global_step == step:
                os.kill(os.getpid(), number)
            return true(task, *arguments)

        monkeypatch.setattr(Classification, method, then)

    return ask


# where it is asked -> the step that is saved: that very step; where a validation is due, the first one after it
WHEN = {
    "before the training": ("configure_optimizers", 0, 1),
    "inside an epoch": ("training_step", 6, 7),
    "before a validation": ("training_step", 4, 6),
    "in a validation": ("validation_step", 5, 6),
}


@pytest.mark.parametrize("when", WHEN)
def test_sigterm_saves_the_step_and_ends_with_143(when, asked, monkeypatch, capsys, tmp_path, finished_run):
    method, step, saved = WHEN[when]
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as planted:
        asked(method, step)
        with pytest.raises(SystemExit) as stop:
            command.main([*RUN, "logger=wandb_offline"])
        planted.undo()
    monkeypatch.undo()
    os.chdir(tmp_path)
    said = capsys.readouterr().err
    assert stop.value.code == 143 and f"stopped by SIGTERM after step {saved}, which is saved" in said and said.count("\n") == 1
    assert json.loads(Path("run/result.json").read_text())["status"] == "interrupted"
    assert load_checkpoint(Path("run/checkpoints/last.ckpt"))["global_step"] == saved
    assert wandb_file.read(Path("run"))[2] == 143 and signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(SystemExit) as stop:
        command.main([*RUN, "logger=csv"])
    assert stop.value.code == 0
    assert untimed(Path("run")) == untimed(finished_run)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert forked.run(folder, RUN)[0] == 0
    return folder / "run"


def test_sigterm_in_the_test_and_without_checkpoints(asked, capsys):
    asked("test_step", 10)
    for option, said in (("trainer.enable_checkpointing=true", "in its test"), ("trainer.enable_checkpointing=false", "in its test")):
        with pytest.raises(SystemExit) as stop:
            command.main([*RUN, option, "resume=never"])
        assert stop.value.code == 143 and said in capsys.readouterr().err
    asked("training_step", 2)
    with pytest.raises(SystemExit) as stop:
        command.main([*RUN, "trainer.enable_checkpointing=false", "resume=never"])
    assert stop.value.code == 143 and "it keeps no checkpoints" in capsys.readouterr().err


def test_slurms_signal_puts_the_job_back_into_its_queue(asked, monkeypatch, capsys, tmp_path):
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("scontrol", "srun"):
        (fake / name).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}.calls\n')
        (fake / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    slurm = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}
    for name, value in (slurm | {"JOB_ID": "1234", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    asked("training_step", 6, signal.SIGUSR1)
    with pytest.raises(SystemExit) as stop:
        command.main(RUN)
    assert stop.value.code == 143 and "stopped by SIGUSR1 after step 7" in capsys.readouterr().err
    assert (tmp_path / "scontrol.calls").read_text() == "requeue 12_3\n"
    assert not list(Path("run").glob("hpc_ckpt*")) and load_checkpoint(Path("run/checkpoints/last.ckpt"))["global_step"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_stop_at_the_same_step_whichever_is_asked(tmp_path, rank):
    """Only one of them gets the signal."""
    many = [*RUN, "trainer.strategy=ddp", "data.global_batch_size=256"]
    answers = forked.run_on_many(tmp_path, many, kill=(rank, ("on_train_batch_start", 6)), number=signal.SIGTERM)
    assert answers[0][1] is not None and "after step 7, which is saved" in answers[0][1][1], answers
    assert [code for code, _ in answers] == [0, 0]
    assert load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 7
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "interrupted"
    answers = forked.run_on_many(tmp_path, many)
    assert answers[0][1][1]["status"] == "finished"


def in_session(number):
    """The commands of all living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == number and state != "Z":
                found.append((path / "cmdline").read_text().replace("\0", " ")[:100])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the first process", "to all processes"])
def test_the_command_runs_on_two_devices_and_stops_at_sigterm(tmp_path, send):
    """lba-train as typed: Lightning starts the second process, each has one that loads data, W&B has its own."""
    root = Path(command.__file__).parents[2]
    run = [sys.executable, "-m", "lba_exp.commands.train", *RUN, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    run += ["trainer.max_epochs=200", "parity=off", "data.workers=1", "logger=wandb_offline"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(run, cwd=tmp_path, env=environment, **pipes)
    deadline = time.monotonic() + 200
    while len(read_rows(tmp_path / "run/metrics.csv")) < 12 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    send(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 143, said
    while left := in_session(process.pid):  # W&B's process and those that load data notice it within seconds
        assert time.monotonic() < deadline + 130, left
        time.sleep(0.2)
    assert len(re.findall(r"stopped by SIGTERM after step \d+, which is saved", said)) == 1, said
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "interrupted"
