"""Two GPUs: the losses of one, checkpoints that one reads, and what the second one brings.

`pytest -m gpu tests/gpu/test_two_devices.py -s` prints the table of throughput, in Markdown; both tests together take some three minutes.
`pytest -m slow tests/gpu/test_two_devices.py -s` goes the same way with two processes on the CPU, where the figures mean nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lba_exp
from lba_exp.results.metrics_log import read_rows
from tests import forked

GPU = {
    "accelerator": "gpu",
    "size": 28,
    "samples": 4096,
    "small": ["model.width=64", "model.depth=2", "model.heads=4"],
    "large": ["model.width=768", "model.depth=12", "model.heads=12", "model.mlp_ratio=4", "trainer.precision=bf16-mixed"],
    "batch": 32,
    "steps": 40,
}
CPU = GPU | {
    "accelerator": "cpu",
    "size": 6,
    "samples": 512,
    "small": ["model.width=16", "model.depth=1", "model.heads=2"],
    "large": ["model.width=16", "model.depth=2", "model.heads=2", "trainer.precision=bf16-mixed"],
    "batch": 8,
    "steps": 6,
}
TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
LIMIT = 120.0  # seconds of a run

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", params=[pytest.param(GPU, marks=TWO_GPUS, id="gpu"), pytest.param(CPU, marks=pytest.mark.slow, id="cpu")])
def machine(request):
    return request.param


@pytest.fixture(scope="module")
def common(machine, tmp_path_factory):
    """Overrides of all runs, on images of noise in ten shades in a local folder."""
    import datasets
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, samples in (("train", machine["samples"]), ("test", 256)):
        labels = rng.integers(0, 10, samples)
        pixels = rng.integers(0, 120, (samples, machine["size"], machine["size"])) + 12 * labels[:, None, None]
        images = [Image.fromarray(image.astype(np.uint8)) for image in pixels]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        found = datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
        found.to_parquet(str(folder / f"{split}.parquet"))
    data = ["data=images", f"data.source={folder}", "data.eval_batch_size=32", "logger=csv", "parity=off"]
    trainer = ["trainer.max_epochs=null", "trainer.check_val_every_n_epoch=null", "trainer.num_sanity_val_steps=0"]
    return [*data, *trainer, f"trainer.accelerator={machine['accelerator']}"]


def train(folder, overrides, devices=1):
    """The record of a run in processes that are forked: they start within seconds."""
    folder.mkdir()
    answers = forked.run_on_many(folder, [*overrides, "folder=run"], devices, limit=LIMIT)
    assert [code for code, _ in answers] == [0] * devices and answers[0][1][0] == "record", answers
    return answers[0][1][1]


def typed(folder, overrides):
    """The same started as a user does; Lightning starts the further processes."""
    folder.mkdir()
    command = [sys.executable, "-m", "lba_exp.commands.train", *overrides, "folder=run"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(lba_exp.__file__).parents[1]), *filter(None, sys.path)])}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(folder):
    return [row["train/step_loss"] for row in read_rows(folder / "run" / "metrics.csv")]


def test_two_give_the_losses_of_one_and_checkpoints_that_one_reads(tmp_path, machine, common):
    run = [*common, *machine["small"], "data.global_batch_size=96", "model.dropout=0", "trainer.max_steps=30"]
    run += ["trainer.val_check_interval=15", "trainer.log_every_n_steps=1"]
    process = typed(tmp_path / "ddp", [*run, "trainer=ddp", f"trainer.accelerator={machine['accelerator']}", "trainer.devices=2"])
    try:
        train(tmp_path / "one", run)
        train(tmp_path / "fsdp", [*run, "trainer.strategy=fsdp2"], devices=2)
        said, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 0, said[-4000:]
    expected = losses(tmp_path / "one")
    assert len(expected) == 30
    for name in ("ddp", "fsdp"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-4), name
        record = json.loads((tmp_path / name / "run" / "result.json").read_text())
        alone = lba_exp.evaluate(tmp_path / name / "run", form="chunkwise", quiet=True)["forms"]["parallel"]
        assert alone["accuracy"] == pytest.approx(record["metrics"]["test"]["accuracy"], abs=2 / 256)


def test_throughput(tmp_path, machine, common, capsys):
    """The batch of a device stays (weak scaling: the second one doubles the work), then the global batch (strong: it halves the time)."""
    batch, steps = machine["batch"], machine["steps"]
    # a checkpoint would be written for longer than the run computes
    run = [*common, *machine["large"], "model.mixer.form=chunkwise", f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    run += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.enable_checkpointing=false"]
    cases = [(1, "auto", batch), (2, "ddp", batch), (2, "fsdp2", batch), (2, "ddp", batch // 2), (2, "fsdp2", batch // 2)]
    lines, alone = [], None
    for devices, strategy, each in cases:
        overrides = [*run, f"data.global_batch_size={devices * each}", f"trainer.strategy={strategy}"]
        record = train(tmp_path / f"{strategy}{each}", overrides, devices)
        assert record["status"] == "finished" and record["batch"]["global"] == devices * each
        cost = record["efficiency"]
        alone = alone or cost["tokens_per_second"]
        scaling = "-" if devices == 1 else "weak" if each == batch else "strong"
        mfu = "-" if cost["mfu"] is None else f"{100 * cost['mfu']:.1f}%"
        cells = [devices, "-" if devices == 1 else strategy, scaling, each, devices * each, f"{cost['tokens_per_second']:,.0f}"]
        cells += [f"{cost['tokens_per_second'] / alone:.2f}", f"{1000 / cost['step_ms']:.2f}", f"{cost['peak_memory_bytes'] / 2**30:.2f}"]
        lines.append(" | ".join(["", *map(str, [*cells, mfu]), ""]).strip())
    head = ["devices", "strategy", "scaling", "batch a device", "global batch", "tokens/s", "times one", "steps/s", "GiB a device", "MFU"]
    where = record["environment"]
    with capsys.disabled():
        print(f"\n{where['device']}, torch {where['torch']}, {where['precision']}, {record['parameters']:,} parameters, ", end="")
        print(f"{machine['size'] ** 2} tokens a sequence, {steps} steps, the first one left out\n")
        print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
        print("\n".join(lines))
