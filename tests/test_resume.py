"""A run that was killed goes on to the same numbers, to the last bit, as one that was not."""

import signal

import pytest
import torch

import lba_exp
from lba_exp.results.folder import Claim, read_record
from lba_exp.results.metrics_log import read_rows
from tests import forked

STEPS_AN_EPOCH = 5  # 1,257 digits in batches of 256
TIMED = ("efficiency/", "latency", "peak_bytes")
RUN = ["model.dropout=0.2", "data.workers=2", "data.augment=shift", "trainer.max_epochs=3", "trainer.log_every_n_steps=1", "folder=run"]


def untimed(rows):
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMED)} for row in rows]


@pytest.fixture(scope="module")
def module_small():
    from tests.conftest import SMALL

    return [*SMALL, *RUN]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, module_small):
    results = {}

    def get(every: int):
        if every not in results:
            folder = tmp_path_factory.mktemp(f"whole{every}")
            code, answer = forked.run(folder, [*module_small, f"checkpoint.every_n_steps={every}"])
            assert (code, answer[0]) == (0, "record"), answer
            results[every] = (folder / "run", answer[1])
        return results[every]

    return get


KILLS = {
    "in mid-epoch": (3, ("on_train_batch_start", 7)),
    "right after a checkpoint": (3, ("on_train_batch_start", 6)),
    "on an epoch's last batch, before validation": (5, ("on_validation_start", 5)),
    "before the checkpoint of an epoch's last batch": (5, ("on_train_batch_end", 10)),
    "after validation": (3, ("on_train_epoch_end", 10)),
    "in the last epoch": (3, ("on_train_batch_start", 13)),
    "at the very end": (3, ("on_test_start", 15)),
    "before the first checkpoint": (3, ("on_train_batch_start", 2)),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_ends_as_if_it_had_not_been(when, tmp_path, module_small, uninterrupted):
    every, kill = KILLS[when]
    overrides = [*module_small, f"checkpoint.every_n_steps={every}"]
    code, answer = forked.run(tmp_path, overrides, kill)
    assert (code, answer) == (-signal.SIGKILL, None)
    folder = tmp_path / "run"
    assert read_record(folder) is None
    with Claim(folder):  # the lock died with the process, although its data workers may live a while longer
        pass
    code, answer = forked.run(tmp_path, overrides)
    assert (code, answer[0]) == (0, "record"), answer

    whole, record = uninterrupted(every)
    assert answer[1]["metrics"] == record["metrics"] and answer[1]["best"] == record["best"]
    rows, expected = read_rows(folder / "metrics.csv"), read_rows(whole / "metrics.csv")
    assert [r["step"] for r in rows] == list(range(1, 3 * STEPS_AN_EPOCH + 1))
    assert untimed(rows) == untimed(expected)
    for name in ("best.ckpt", "last.ckpt"):
        ours, theirs = (torch.load(f / "checkpoints" / name, weights_only=True) for f in (folder, whole))
        assert ours["global_step"] == theirs["global_step"]
        assert ours["state_dict"].keys() == theirs["state_dict"].keys()
        for key, value in ours["state_dict"].items():
            assert torch.equal(value, theirs["state_dict"][key]), key
        for slot, state in ours["optimizer_states"][0]["state"].items():
            for key, value in state.items():
                assert torch.equal(value, theirs["optimizer_states"][0]["state"][slot][key])


def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, module_small, uninterrupted, capsys):
    overrides = [*module_small, "checkpoint.every_n_steps=3"]
    forked.run(tmp_path, overrides, ("on_train_batch_start", 7))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    record = lba_exp.train(lba_exp.compose(overrides))
    said = " ".join(capsys.readouterr().out.split())
    assert "last.ckpt cannot be read (the file is cut short" in said and "previous.ckpt, the one before it." in said
    assert record["metrics"] == uninterrupted(3)[1]["metrics"]


def test_a_finished_run_is_not_overwritten(tmp_path, module_small):
    short = [*module_small, "trainer.max_epochs=1"]
    _, (kind, record) = forked.run(tmp_path, short)
    assert kind == "record" and record["status"] == "finished"
    folder = tmp_path / "run"
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    _, (kind, again) = forked.run(tmp_path, short)
    assert kind == "record" and again["already_finished"] and again["metrics"] == record["metrics"]
    _, (kind, sentence) = forked.run(tmp_path, [*short, "resume=never"])
    assert kind == "error" and "RunFolderError" in sentence and "finished" in sentence
    _, (kind, sentence) = forked.run(tmp_path, [*short, "optim.lr=0.5"])
    assert kind == "error" and "optim.lr is 0.002 there, 0.5 here" in sentence
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before


def test_an_unfinished_run_is_set_aside_by_resume_never(tmp_path, module_small):
    overrides = [*module_small, "trainer.max_epochs=1", "checkpoint.every_n_steps=2"]
    forked.run(tmp_path, overrides, ("on_train_batch_start", 3))
    _, (kind, record) = forked.run(tmp_path, [*overrides, "resume=never"])
    assert kind == "record" and record["status"] == "finished"
    assert (tmp_path / "run.aside1" / "checkpoints" / "last.ckpt").is_file()


def test_a_folder_in_use_is_refused(tmp_path, module_small):
    with Claim(tmp_path / "run"):
        _, (kind, sentence) = forked.run(tmp_path, module_small)
    assert kind == "error" and "in use by another process" in sentence
