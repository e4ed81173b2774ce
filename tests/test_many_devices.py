"""A run on two devices is the run on one: the same losses, and checkpoints that either goes on from."""

import signal

import pytest
import torch

from lba_exp.results.folder import read_record
from lba_exp.results.metrics_log import read_rows
from tests import forked
from tests.conftest import SMALL

# 1,258 training digits in global batches of 258, the last one not full
RUN = [
    *[o for o in SMALL if "batch_size" not in o],
    "data.global_batch_size=258",
    "model.dropout=0",
    "trainer.log_every_n_steps=1",
    "trainer.max_epochs=2",
    "checkpoint.every_n_steps=3",
    "folder=run",
]
LOSSES = ("train/step_loss", "train/loss", "val/loss", "val/accuracy", "train/accuracy")


def curve(folder):
    return [{k: row[k] for k in LOSSES if k in row} for row in read_rows(folder / "run" / "metrics.csv")]


def same(curve, other, tolerance=1e-5):
    assert len(curve) == len(other) == 10
    for row, expected in zip(curve, other, strict=True):
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    code, answer = forked.run(folder, RUN)
    assert (code, answer[0]) == (0, "record"), answer
    return folder, answer[1]


def finished(answers):
    assert [code for code, _ in answers] == [0] * len(answers), answers
    return answers[0][1][1]


def test_two_processes_give_the_losses_of_one(tmp_path, alone):
    record = finished(forked.run_on_many(tmp_path, [*RUN, "trainer.strategy=ddp"]))
    same(curve(tmp_path), curve(alone[0]))
    assert record["metrics"]["test"] == pytest.approx(alone[1]["metrics"]["test"], rel=1e-5)
    assert record["batch"] == {"per_device": 129, "devices": 2, "accumulated": 1, "global": 258}
    ours, theirs = record["efficiency"], alone[1]["efficiency"]
    assert ours["flops_per_step"] == theirs["flops_per_step"] > 0 and "largest of 2 devices" in ours["peak_memory_method"]
    assert record["parity"]["verdict"] == "pass" and record["parity"]["forms"]["recurrent"]["count"] == 359


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_run_moves_between_numbers_of_devices(tmp_path, alone, strategy, step):
    """Killed in mid-epoch on two devices, gone on with on one, killed again, gone on with on two."""
    many = [*RUN, f"trainer.strategy={strategy}"]
    answers = forked.run_on_many(tmp_path, many, kill=(1, ("on_train_batch_start", step)))
    assert answers[1][0] == -signal.SIGKILL and (read_record(tmp_path / "run") or {"status": "none"})["status"] != "finished"
    assert forked.run(tmp_path, RUN, ("on_train_batch_start", step + 1))[0] == -signal.SIGKILL
    finished(forked.run_on_many(tmp_path, many))
    same(curve(tmp_path), curve(alone[0]))


@pytest.mark.slow
def test_the_killed_first_process_is_gone_on_from(tmp_path, alone):
    many = [*RUN, "trainer.strategy=ddp"]
    assert forked.run_on_many(tmp_path, many, kill=(0, ("on_train_batch_start", 7)))[0][0] == -signal.SIGKILL
    finished(forked.run_on_many(tmp_path, many))
    same(curve(tmp_path), curve(alone[0]))


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5, 8])
def test_a_run_moves_between_sizes_of_a_batch(tmp_path, alone, step):
    """Killed inside an epoch or right after its end with whole batches, gone on with in thirds, killed again, gone on with in halves."""
    assert forked.run(tmp_path, RUN, ("on_train_batch_start", step))[0] == -signal.SIGKILL
    thirds = [*RUN, "trainer.accumulate_grad_batches=3"]
    assert forked.run(tmp_path, thirds, ("on_train_batch_start", step + 1))[0] == -signal.SIGKILL
    code, answer = forked.run(tmp_path, [*RUN, "trainer.accumulate_grad_batches=2"])
    assert code == 0 and answer[1]["batch"] == {"per_device": 129, "devices": 1, "accumulated": 2, "global": 258}
    same(curve(tmp_path), curve(alone[0]))


@pytest.mark.slow
def test_sharded_weights_give_the_losses_of_one_and_a_plain_checkpoint(tmp_path, alone):
    record = finished(forked.run_on_many(tmp_path, [*RUN, "trainer.strategy=fsdp2"]))
    same(curve(tmp_path), curve(alone[0]))
    assert record["parity"]["verdict"] == "pass"
    ours, theirs = (torch.load(f / "run/checkpoints/last.ckpt", weights_only=True) for f in (tmp_path, alone[0]))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, value in theirs["state_dict"].items():
        assert type(ours["state_dict"][key]) is torch.Tensor
        torch.testing.assert_close(ours["state_dict"][key], value, rtol=1e-4, atol=1e-5)
    ours, theirs = (c["optimizer_states"][0] for c in (ours, theirs))
    assert ours["param_groups"] == theirs["param_groups"]
    for number, state in theirs["state"].items():
        torch.testing.assert_close(ours["state"][number], state, rtol=1e-3, atol=1e-6)
