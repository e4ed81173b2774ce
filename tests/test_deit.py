"""Runs by DeiT's recipe: interrupted and gone on with, the moving average of the weights, the rate, skipped images in the record."""

import signal

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lba_exp
from lba_exp import build
from lba_exp.callbacks.averaging import MovingAverage
from lba_exp.callbacks.checkpoints import load_checkpoint
from lba_exp.commands import train as command
from lba_exp.nn.norms import BatchNorm
from lba_exp.results.folder import read_record
from lba_exp.results.metrics_log import read_rows
from tests import forked
from tests.conftest import SMALL
from tests.data.test_image_classification import broken

RUN = [
    *SMALL,
    "size=vit_tiny",
    "data=digits_images",
    "augmentation=deit",
    "optim=deit",
    "model.width=16",
    "model.depth=2",
    "model.heads=2",
    "model.patch_size=2",
    "model.drop_path=0.1",
    "optim.ema_decay=0.8",
    "optim.warmup_epochs=1",
    "data.workers=1",
    "trainer.log_every_n_steps=1",
    "trainer.max_epochs=2",
    "checkpoint.every_n_steps=3",
    "folder=run",
]
STEPS = 4  # an epoch: 1,024 digits in batches of 256
STATES = ("state_dict", "current_model_state", "averaging_state")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, answer = forked.run(folder, RUN)
    assert (code, answer[0]) == (0, "record"), answer
    return folder / "run", answer[1]


@pytest.mark.parametrize(("step", "number"), [(3, signal.SIGKILL), (6, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_stopped_run_of_the_whole_recipe_ends_as_if_it_had_not_been(tmp_path, uninterrupted, step, number):
    """SIGTERM: the average that is saved has the very step after which the run is saved."""
    whole, record = uninterrupted
    code, answer = forked.run(tmp_path, RUN, ("on_train_batch_start", step), number=number)
    if number == signal.SIGKILL:
        assert code == -number and read_record(tmp_path / "run") is None
    else:
        assert "after step 2, which is saved" in answer[1]
    code, answer = forked.run(tmp_path, RUN)
    assert (code, answer[0]) == (0, "record"), answer
    assert answer[1]["metrics"] == record["metrics"] and record["parity"]["verdict"] == "pass"
    losses = [[row.get("train/step_loss") for row in read_rows(folder / "metrics.csv")] for folder in (tmp_path / "run", whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 2 * STEPS
    for name in ("best.ckpt", "last.ckpt"):
        ours, theirs = (load_checkpoint(folder / "checkpoints" / name) for folder in (tmp_path / "run", whole))
        for part in STATES:
            assert ours[part].keys() == theirs[part].keys()
            assert all(torch.equal(value, theirs[part][key]) for key, value in ours[part].items())


def test_what_is_tested_and_evaluated_is_the_average(uninterrupted):
    folder, record = uninterrupted
    content = load_checkpoint(folder / "checkpoints" / "best.ckpt")
    assert any(not torch.equal(value, content["current_model_state"][key]) for key, value in content["state_dict"].items())
    result = lba_exp.evaluate(folder, split="validation", form="recurrent", quiet=True)
    assert result["forms"]["recurrent"]["accuracy"] == pytest.approx(record["metrics"]["validation"]["accuracy"])
    data = build.data_module(lba_exp.compose(RUN))
    task = build.task(lba_exp.compose(RUN), data.spec)
    task.load_state_dict(content["current_model_state"])
    [batch] = list(data.split_loader("validation"))
    with torch.no_grad():
        raw = nn.functional.cross_entropy(task.eval()(batch), batch["labels"])
    assert abs(float(raw) - record["metrics"]["validation"]["loss"]) > 1e-4


def test_the_rate_follows_the_batch_and_warms_up_for_epochs(uninterrupted):
    rates = [row["optim/lr"] for row in read_rows(uninterrupted[0] / "metrics.csv")]
    peak = 5e-4 * 256 / 512
    assert rates[:STEPS] == pytest.approx([peak * step / (STEPS + 1) for step in range(2, STEPS + 1)] + [peak])
    cfg = lba_exp.compose([*RUN, "trainer.accumulate_grad_batches=2", "optim.lr_batch=64", "optim.warmup_epochs=0"])
    data = build.data_module(cfg)
    task = build.task(cfg, data.spec)
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, max_steps=1, accumulate_grad_batches=2, accelerator="cpu", num_sanity_val_steps=0, **off)
    trainer.fit(task, train_dataloaders=None, datamodule=data)
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(5e-4 * 512 / 64)


class Small(pl.LightningModule):
    """A batch norm and a buffer of whole numbers, trained on noise; keeps its weights after each step, and those that are validated."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), BatchNorm(3)
        self.register_buffer("order", torch.arange(100))
        self.after, self.validated = [], []

    def training_step(self, batch, batch_idx):
        return self.norm(self.layer(batch).unsqueeze(1), None).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.after.append({key: value.clone() for key, value in self.state_dict().items()})

    def validation_step(self, batch, batch_idx):
        self.validated.append({key: value.clone() for key, value in self.state_dict().items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def test_the_moving_average_is_by_its_definition(tmp_path):
    torch.manual_seed(0)
    module, callback = Small(), MovingAverage(0.9)
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], num_sanity_val_steps=0, default_root_dir=tmp_path, **off)
    trainer.fit(module, torch.randn(5, 4, 3), torch.randn(1, 4, 3))
    average = module.after[0]
    for number, now in enumerate(module.after):
        if number:
            average = {key: 0.9 * average[key] + 0.1 * now[key] if value.is_floating_point() else value for key, value in now.items()}
        if number in (4, 9):
            seen = module.validated[number // 5]
            assert all(torch.allclose(seen[key], value, rtol=1e-5, atol=1e-6) for key, value in average.items())
            assert seen["order"].tolist() == list(range(100)) and not torch.allclose(seen["layer.weight"], now["layer.weight"], rtol=1e-3)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in module.validated[1].items())  # the end of training


def test_a_record_counts_skipped_images(tmp_path):
    source = broken(tmp_path / "zoo")
    run = [o for o in RUN if not o.startswith(("data", "folder", "checkpoint"))]
    run += [
        "data=image_folder",
        "data.channels=1",
        "data.size=4",
        "data.eval_resize=null",
        "data.channel_mean=null",
        "trainer.max_epochs=1",
    ]
    run += ["data.channel_deviation=null", f"data.source={source}", "data.unreadable=skip", "data.validation_fraction=0.2", "logger=csv"]
    record = lba_exp.train(lba_exp.compose([*run, f"folder={tmp_path / 'run'}", "parity=off", "data.batch_size=8"]), quiet=True)
    assert record["status"] == "finished" and record["skipped_images"] == {"train": 3, "test": 1}
    assert "zoo, train split: 3 of 20 images cannot be read and are skipped" in (tmp_path / "run" / "train.log").read_text()


def test_experiments_of_the_recipe_compose():
    for name in ("fashion_mnist_deit", "fashion_mnist_patches", "cifar100_vit_tiny"):
        assert lba_exp.compose([f"experiments={name}"]).data.kind == "image_classification"
    for size in ("tiny", "small", "base"):
        cfg = lba_exp.compose([f"experiments=imagenet_deit_{size}", "model=softmax"])
        assert (cfg.augmentation.repeats, cfg.data.classes, cfg.optim.ema_decay, cfg.model.drop_path) == (3, 1000, 0.99996, 0.1)
        assert (cfg.model.name, cfg.data.test_split, cfg.trainer.gradient_clip_val) == ("softmax", "validation", None)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["data.source=./nowhere"], "the data folder ./nowhere does not exist"),
        (["data.source=broken"], "image 2"),
        (["data.source=broken", "augmentation.crop_scale=[0.5]"], "augmentation.crop_scale=[0.5] does not fit"),
        (["data.source=broken", "augmentation.crop=resize"], "augmentation.crop=resize: 'resize' is not valid"),
        (["data.source=broken", "model.kind=sequence_classifier"], "does not read whole images"),
        (["data.source=broken", "data.channel_deviation=[0]"], "pixels are divided by it"),
        (["data.source=broken", "trainer=fsdp", "optim.ema_decay=0.9"], "does not go with trainer=fsdp"),
        (["data.source=broken", "trainer=ddp", "sequence_parallel_size=2", "augmentation=deit"], "parts of one image"),
        (["data=digits", "model.kind=sequence_classifier", "augmentation=deit"], "augmentation.crop=resized is for data.kind=image"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(tmp_path, capsys, overrides, said):
    broken(tmp_path / "broken")
    run = ["size=vit_tiny", "data=image_folder", "data.channels=1", "data.size=4", "data.eval_resize=null", "data.channel_mean=null"]
    run += ["data.channel_deviation=null", "model.patch_size=2", "logger=csv", "trainer.accelerator=cpu"]
    with pytest.raises(SystemExit) as stop:
        command.main([*run, *overrides])
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and said in complaint and "Traceback" not in complaint
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_whole_recipe_on_two_processes(tmp_path):
    """Each has batches, mixing and copies of its own, and the same average; one that is killed goes on as it would have."""
    many = [*RUN, "trainer.strategy=ddp", "data.global_batch_size=256"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    forked.run_on_many(killed, many, kill=(1, ("on_train_batch_start", 6)))
    results = []
    for folder in (whole, killed):
        answers = forked.run_on_many(folder, many)
        assert [code for code, _ in answers] == [0, 0], answers
        content = load_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")
        results.append((read_record(folder / "run")["metrics"], [content[part] for part in STATES]))
    (metrics, parts), (again, same) = results
    assert metrics == again and metrics["test"]["loss"] > 0
    for one, other in zip(parts, same, strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())
