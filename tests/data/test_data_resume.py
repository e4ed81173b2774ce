"""A run that was stopped and resumed sees the batches of the run that was not, with Lightning's own Trainer."""

import logging
import re
import shutil

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lba_exp.data.loader import ResumableLoader

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("The dirpath has changed", "callbacks used to create", "You defined a .validation_step.")
]

SAMPLES, BATCH, EPOCHS = 23, 4, 3  # 6 batches an epoch, the last one short


class Numbers:
    def __len__(self):
        return SAMPLES

    def draw(self, index, rng):
        return torch.tensor([index, int(rng.integers(1 << 40))])


class Killed(BaseException):
    """Not an Exception: nothing on the way may catch it."""


class Recorder(pl.LightningModule):
    """Trains one weight and writes down every batch, validation and epoch end."""

    def __init__(self, kill_at=None):
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.kill_at = kill_at
        self.batches, self.validations, self.ends = [], [], []

    def on_train_batch_start(self, batch, batch_idx):
        if self.kill_at == (self.current_epoch, batch_idx):
            raise Killed

    def training_step(self, batch, batch_idx):
        self.batches.append((self.current_epoch, batch_idx, batch.tolist()))
        return self.weight(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validations.append((self.global_step, batch.tolist()))

    def on_train_epoch_end(self):
        self.ends.append(self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def fit(folder, *, workers=0, validate=False, at="steps", every=1, resume=None, kill_at=None, **trainer):
    module = Recorder(kill_at)
    when = {"every_n_train_steps": every} if at == "steps" else {"every_n_epochs": 1, "save_on_train_epoch_end": at == "epoch end"}
    loader = ResumableLoader(Numbers(), BATCH, seed=1, shuffle=True, workers=workers)
    pl.Trainer(
        **{"max_epochs": EPOCHS, **trainer},
        accelerator="cpu",
        callbacks=[ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)],
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader, ResumableLoader(Numbers(), 8, seed=1, shuffle=False) if validate else None, ckpt_path=resume)
    return module


def checkpoints(folder):
    """(optimizer step, path), in order."""
    return sorted((int(re.search(r"step=(\d+)", path.name)[1]), path) for path in folder.glob("*.ckpt"))


CASES = {
    "every step, no validation": {},
    "every step, validation at the epoch's end": {"validate": True},
    "every step, validation inside the epoch": {"validate": True, "val_check_interval": 2},
    "every step, epochs cut short": {"validate": True, "limit_train_batches": 4},
    "every step, a number of steps": {"validate": True, "max_steps": 14},
    "every second step, two batches a step": {"every": 2, "validate": True, "accumulate_grad_batches": 2},
    "validation end": {"at": "validation end", "validate": True},
    "validation end, inside the epoch": {"at": "validation end", "validate": True, "val_check_interval": 2},
    "validation end, a number of steps": {"at": "validation end", "validate": True, "max_steps": 14},
    "epoch end": {"at": "epoch end", "validate": True},
    "2 workers, every second step, no validation": {"workers": 2, "every": 2},
    "2 workers, every third step, validation inside the epoch": {"workers": 2, "every": 3, "validate": True, "val_check_interval": 2},
    "2 workers, validation end": {"workers": 2, "at": "validation end", "validate": True},
    "2 workers, epochs cut short": {"workers": 2, "every": 2, "limit_train_batches": 4},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_from_every_checkpoint_on_the_batches_are_those_of_the_whole_run(tmp_path, case):
    """Every checkpoint: inside an epoch, on an epoch's last batch, in the last epoch, after the last batch of all."""
    whole = fit(tmp_path / "whole", **case)
    found = checkpoints(tmp_path / "whole")
    an_epoch = case.get("limit_train_batches", 6)
    if case.get("at", "steps") == "steps" and "accumulate_grad_batches" not in case:
        assert [step for step, _ in found] == list(range(case.get("every", 1), len(whole.batches) + 1, case.get("every", 1)))
    assert {index for _, index, _ in whole.batches} == set(range(an_epoch))
    for step, path in found:
        done = step * case.get("accumulate_grad_batches", 1)
        resumed = fit(tmp_path / "resumed", resume=path, **case)
        assert resumed.batches == whole.batches[done:], f"resumed at step {step}"
        if case.get("at") == "validation end":
            # these checkpoints lose no validation and no epoch end either; one on an epoch's last batch does (Lightning 2.6)
            assert resumed.validations == [validation for validation in whole.validations if validation[0] > step]
            assert resumed.ends == [end for end in whole.ends if end >= step]
        shutil.rmtree(tmp_path / "resumed", ignore_errors=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kill_at", [(0, 4), (1, 0), (1, 5), (2, 0), (2, 5)], ids="epoch {0[0]} batch {0[1]}".format)
def test_a_killed_run_goes_on_from_its_latest_checkpoint(tmp_path, workers, kill_at):
    whole = fit(tmp_path / "whole", validate=True)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", workers=workers, validate=True, every=3, kill_at=kill_at)
    step, latest = checkpoints(tmp_path / "killed")[-1]
    assert step == (kill_at[0] * 6 + kill_at[1]) // 3 * 3
    resumed = fit(tmp_path / "resumed", workers=workers, validate=True, resume=latest)
    assert resumed.batches == whole.batches[step:]


def test_lightning_stops_the_workers_when_the_fit_ends(tmp_path):
    loader = ResumableLoader(Numbers(), BATCH, seed=1, shuffle=True, workers=2)
    seen = []

    class Watch(Recorder):
        def on_train_batch_end(self, *args):
            seen.append(list(loader._iterator._workers))

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(max_epochs=2, accelerator="cpu", **options).fit(Watch(), loader)
    assert len({worker.pid for workers in seen for worker in workers}) == 2
    assert not any(worker.is_alive() for worker in seen[-1])
    assert len(list(loader)) == 6  # and new ones start when the loader is asked again
