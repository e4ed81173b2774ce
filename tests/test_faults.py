"""What goes wrong while a run runs: one sentence, nothing lost."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

import lba_exp
from lba_exp.callbacks.checkpoints import load_checkpoint
from lba_exp.errors import ConfigError, RunFolderError, TrainingError
from lba_exp.tasks.classification import Classification


def test_a_run_that_diverges_stops_with_the_step_and_the_batch(small):
    overrides = [*small, "optim.lr=1e9", "optim.warmup_fraction=0", "trainer.gradient_clip_val=null", "folder=run"]
    with pytest.raises(TrainingError, match=r"the loss is nan at step 2 \(epoch 1, batch 2, training samples \d+, .*optim.lr"):
        lba_exp.train(lba_exp.compose(overrides), quiet=True)
    assert json.loads(Path("run/result.json").read_text())["status"] == "failed"
    assert not Path("run/checkpoints").exists()


DIVERGING = {"validation_step": "validation loss is nan", "on_train_batch_end": "the weights are no numbers any more"}


@pytest.mark.parametrize(("hook", "said"), DIVERGING.items(), ids=DIVERGING)
def test_weights_that_are_no_numbers_never_replace_a_good_checkpoint(small, monkeypatch, hook, said):
    true = getattr(Classification, hook)

    def diverges(task, *arguments):
        if task.global_step == 10:
            next(iter(task.model.parameters())).data.fill_(float("nan"))
        return true(task, *arguments)

    monkeypatch.setattr(Classification, hook, diverges)
    with pytest.raises(TrainingError, match=said + r" after step 10.*last.ckpt"):
        lba_exp.train(lba_exp.compose([*small, "trainer.max_epochs=3", "parity=off", "folder=run"]), quiet=True)
    kept = load_checkpoint(Path("run/checkpoints/last.ckpt"))
    assert kept["global_step"] == 5 and all(bool(v.isfinite().all()) for v in kept["state_dict"].values())


def test_no_memory_and_no_disk_are_one_sentence(small, monkeypatch):
    def raises(error):
        def function(*arguments, **options):
            raise error

        return function

    said = r"out of memory on GPU with data.batch_size=256.*form=chunkwise"
    with monkeypatch.context() as planted, pytest.raises(TrainingError, match=said):
        planted.setattr(Classification, "training_step", raises(torch.OutOfMemoryError("CUDA out of memory.")))
        lba_exp.train(lba_exp.compose([*small, "folder=run"]), quiet=True)
    with monkeypatch.context() as planted, pytest.raises(RunFolderError, match=r"cannot be written \(No space left on device\): free some"):
        planted.setattr(torch, "save", raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        lba_exp.train(lba_exp.compose([*small, "folder=run"]), quiet=True)
    assert lba_exp.train(lba_exp.compose([*small, "folder=run"]), quiet=True)["status"] == "finished"


def test_wandb_without_a_key_is_one_sentence(small, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"W&B does not start.*wandb login.*logger=wandb_offline"):
        lba_exp.train(lba_exp.compose([*small, "logger=wandb", "folder=run"]), quiet=True)
    assert not Path("run").exists()
