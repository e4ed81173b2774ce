"""What goes wrong while a run runs: one sentence, nothing lost."""

import errno
import io
import json
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

import lba_exp
from lba_exp.callbacks import checkpoints
from lba_exp.callbacks.checkpoints import AtomicCheckpointIO, load_checkpoint
from lba_exp.errors import ConfigError, RunFolderError, TrainingError, UserError
from lba_exp.tasks.classification import Classification
from tests import forked


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
    # the second is the driver's own, as an error of no class of its own
    for full in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be")):
        with monkeypatch.context() as planted, pytest.raises(TrainingError, match=said):
            planted.setattr(Classification, "training_step", raises(full))
            lba_exp.train(lba_exp.compose([*small, "folder=run"]), quiet=True)
    with monkeypatch.context() as planted, pytest.raises(RunFolderError, match=r"cannot be written \(No space left on device\): free some"):
        planted.setattr(torch, "save", raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        lba_exp.train(lba_exp.compose([*small, "folder=run"]), quiet=True)
    assert lba_exp.train(lba_exp.compose([*small, "folder=run"]), quiet=True)["status"] == "finished"


def test_no_memory_with_a_global_batch_says_how_to_cut_it(small, monkeypatch):
    def raises(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Classification, "training_step", raises)
    overrides = [*small, "data.global_batch_size=128", "trainer.accumulate_grad_batches=2", "folder=run"]
    with pytest.raises(TrainingError, match=r"with 64 sequences a device .*more trainer.accumulate_grad_batches: the global batch stays"):
        lba_exp.train(lba_exp.compose(overrides), quiet=True)


def test_a_global_batch_that_does_not_divide_is_one_sentence(small):
    overrides = [*small, "data.global_batch_size=100", "trainer.accumulate_grad_batches=3", "folder=run"]
    with pytest.raises(ConfigError, match=r"global_batch_size=100 does not divide among 1 devices x 3 batches a step.*give 99 or 102"):
        lba_exp.train(lba_exp.compose(overrides), quiet=True)
    assert not Path("run").exists()


@pytest.mark.parametrize(("strategy", "said"), [("fsdp", "trainer=fsdp"), ("ddp_spawn", "trainer=ddp"), ("ddp_notebook", "trainer=ddp")])
def test_a_strategy_that_leaves_no_record_is_refused(small, strategy, said):
    with pytest.raises(ConfigError, match=said):
        lba_exp.compose([*small, f"trainer.strategy={strategy}"])


def test_a_folder_that_cannot_be_made_is_one_sentence(small):
    Path("file").write_text("")
    for folder, reason in {"/proc/run": "No such file", "file/run": "Not a directory"}.items():
        with pytest.raises(RunFolderError, match=rf"the run folder .* cannot be (used|written) \({reason}.*give another root= or folder="):
            lba_exp.train(lba_exp.compose([*small, f"folder={folder}"]), quiet=True)


def test_a_folder_that_may_not_be_written_any_more_is_one_sentence(small, monkeypatch):
    """root may write everywhere: what the kernel would say to another user is planted."""
    true = os.replace

    def refuses(source, target):
        if Path(target).name == "last.ckpt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        return true(source, target)

    said = r"cannot be written \(Permission denied\): make it writable"
    with monkeypatch.context() as planted, pytest.raises(RunFolderError, match=said):
        planted.setattr(os, "replace", refuses)
        lba_exp.train(lba_exp.compose([*small, "folder=run"]), quiet=True)
    assert lba_exp.train(lba_exp.compose([*small, "folder=run"]), quiet=True)["status"] == "finished"


def test_ctrl_c_in_the_midst_of_a_checkpoint_is_an_interruption(tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, data):
            if self.tell() > 1000:
                raise KeyboardInterrupt
            return super().write(data)

    path, numbers = tmp_path / "last.ckpt", {"before": torch.ones(100_000)}
    AtomicCheckpointIO().save_checkpoint(numbers, path)
    monkeypatch.setattr(checkpoints, "open", Interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"after": torch.ones(100_000)}, path)
    assert list(torch.load(path)) == ["before"]


def test_no_pickle_of_a_stranger_is_run(small, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state_dict": {}, "global_step": 1, "trap": Trap()}, "trap.ckpt")
    with pytest.raises(UserError, match=r"trap.ckpt cannot be read"):
        lba_exp.train(lba_exp.compose([*small, "resume=trap.ckpt", "folder=run"]), quiet=True)
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint("trap.ckpt", weights_only=False)
    assert not (tmp_path / "sprung").exists()


def test_no_secret_is_written(small, monkeypatch, tmp_path):
    secrets = {"WANDB_API_KEY": "a" * 32 + "5ecret01", "HF_TOKEN": "hf_5ecret02"}
    secrets |= {"AWS_SECRET_ACCESS_KEY": "5ecret03/x", "SOME_PASSWORD": "5ecret04"}
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x.x"]
    for command in (
        ["init", "-q"],
        ["commit", "-qm", "x", "--allow-empty"],
        ["remote", "add", "origin", "https://me:5ecret05@example.org/x.git"],
    ):
        subprocess.run([*git, *command], check=True)

    def tells(*arguments):
        raise RuntimeError(f"401 for Bearer {secrets['HF_TOKEN']} and {secrets['WANDB_API_KEY']}")

    overrides = [*[o for o in small if not o.startswith("logger")], "trainer.max_epochs=1"]
    # in a process of its own: W&B would keep the key for the tests to come
    code, answer = forked.run(tmp_path, [*overrides, "folder=run"], environment=secrets)
    assert (code, answer[0]) == (0, "record"), answer
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as planted, pytest.raises(RuntimeError, match="401"):
        planted.setattr(Classification, "validation_step", tells)
        lba_exp.train(lba_exp.compose([*small, "folder=failed"]), quiet=True)
    assert "401 for Bearer *** and ***" in Path("failed/result.json").read_text()
    assert "401 for Bearer *** and ***" in Path("failed/train.log").read_text()
    files = [p for folder in ("run", "failed") for p in Path(folder).rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files) and len(files) > 12, files
    assert [str(p) for p in files if b"5ecret" in p.read_bytes()] == []


def test_wandb_without_a_key_is_one_sentence(small, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"W&B does not start.*wandb login.*logger=wandb_offline"):
        lba_exp.train(lba_exp.compose([*small, "logger=wandb", "folder=run"]), quiet=True)
    assert not Path("run").exists()
