"""100 runs killed at random moments: each goes on to the record, the rows and the weights of the run that was not killed.

`pytest -m slow tests/test_kill_points.py -s` prints how the kills fell.
"""

import collections
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch

from lba_exp.results.folder import read_record
from lba_exp.results.metrics_log import read_rows
from tests import forked
from tests.conftest import SMALL

POINTS = 100
RUN = [*SMALL, "model.dropout=0.2", "data.augment=shift", "trainer.max_epochs=3", "trainer.log_every_n_steps=1"]
RUN += ["checkpoint.every_n_steps=1", "parity.full_test=false", "folder=run"]
TIMED = ("efficiency/", "latency", "peak_bytes")


def untimed(folder):
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMED)} for row in read_rows(folder / "metrics.csv")]


def weights(folder):
    return torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]


def state(folder):
    """What a killed run left, in words."""
    if not (folder / "config.yaml").is_file():
        return "before the run began"
    if list(folder.rglob(".*.part")):
        return "while a checkpoint or a table was written"
    if (folder / "result.json").is_file():
        return "after its record"
    if not (folder / "checkpoints" / "last.ckpt").is_file():
        return "before the first checkpoint"
    return "in the test" if read_rows(folder / "metrics.csv")[-1]["step"] == 15 else "in training"


def killed_after(folder, seconds):
    """One run with a SIGKILL so many seconds after its start: whether that came before the run's own end."""
    process, receiver = forked.start(folder, RUN)
    timer = threading.Timer(seconds, lambda: process.is_alive() and os.kill(process.pid, signal.SIGKILL))
    timer.start()
    code, _ = forked.answer_of(process, receiver)
    timer.cancel()
    return code == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_runs_killed_at_random_moments_end_as_the_one_that_was_not(tmp_path, capsys):
    durations = []
    for name in ("warm", "whole"):  # the first run starts the process that the others are forked from
        (tmp_path / name).mkdir()
        began = time.monotonic()
        code, answer = forked.run(tmp_path / name, RUN)
        durations.append(time.monotonic() - began)
        assert (code, answer[0]) == (0, "record"), answer
    whole, expected = tmp_path / "whole" / "run", answer[1]
    rows, best = untimed(whole), weights(whole)
    moments = random.Random(0)
    fell, starts, began = collections.Counter(), 0, time.monotonic()
    for point in range(POINTS):
        folder, kills = tmp_path / f"point{point}", 0
        while kills < 1 + (point % 4 == 0):  # every fourth run is killed a second time, where it has not ended by then
            if not kills:  # nothing yet, or a run that was faster than the kill
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            starts += 1
            if killed_after(folder, moments.uniform(0, durations[-1])):
                kills += 1
                fell[state(folder / "run")] += 1
                record = read_record(folder / "run")  # there is none, or a whole one
                assert record is None or record["status"] == "finished"
            elif kills:
                break
        starts += 1
        code, answer = forked.run(folder, RUN)
        assert code == 0, (point, answer)
        record = read_record(folder / "run")
        assert record["status"] == "finished" and record["metrics"] == expected["metrics"] and record["best"] == expected["best"]
        assert untimed(folder / "run") == rows, point
        assert all(torch.equal(value, best[key]) for key, value in weights(folder / "run").items()), point
    with capsys.disabled():
        print(f"\n{POINTS} killed runs of {durations[-1]:.1f} s: {POINTS} ended as the one that was not killed; ", end="")
        print(f"{sum(fell.values())} kills, {starts} starts, {time.monotonic() - began:.0f} s")
        for when, number in fell.most_common():
            print(f"  {number:4} {when}")
