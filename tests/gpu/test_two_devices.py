"""Two GPUs: the losses of one, checkpoints that one reads, and what the second one brings.

`pytest -m gpu tests/gpu/test_two_devices.py -s` prints the table of throughput; both tests together take some minutes.
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

ACCELERATOR, SIZE, TRAINING = "gpu", 28, 8192
SMALL = ["model.width=64", "model.depth=2", "model.heads=4"]
LARGE = ["model.width=768", "model.depth=12", "model.heads=12", "model.mlp_ratio=4"]
STEPS = 60

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(ACCELERATOR == "gpu" and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of noise in ten shades, as a local folder."""
    import datasets
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, samples in (("train", TRAINING), ("test", 512)):
        labels = rng.integers(0, 10, samples)
        pixels = rng.integers(0, 120, (samples, SIZE, SIZE)) + 12 * labels[:, None, None]
        images = [Image.fromarray(image.astype(np.uint8)) for image in pixels]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        found = datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
        found.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def train(folder, data, *overrides):
    """A run as typed on the command line; its record."""
    command = [sys.executable, "-m", "lba_exp.commands.train", "data=images", f"data.source={data}", "logger=csv", "parity=off"]
    command += [f"trainer.accelerator={ACCELERATOR}", "trainer.max_epochs=null", "trainer.check_val_every_n_epoch=null"]
    command += ["trainer.num_sanity_val_steps=0", f"folder={folder}", *overrides]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(lba_exp.__file__).parents[1]), *filter(None, sys.path)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text())


def test_two_gpus_give_the_losses_of_one_and_checkpoints_that_one_reads(tmp_path, data):
    run = [*SMALL, "data.global_batch_size=96", "model.dropout=0", "trainer.max_steps=30", "trainer.val_check_interval=15"]
    run += ["trainer.log_every_n_steps=1"]
    train(tmp_path / "one", data, *run)
    expected = [row["train/step_loss"] for row in read_rows(tmp_path / "one" / "metrics.csv")]
    assert len(expected) == 30
    for preset in ("ddp", "fsdp"):
        record = train(tmp_path / preset, data, *run, f"trainer={preset}", f"trainer.accelerator={ACCELERATOR}", "trainer.devices=2")
        losses = [row["train/step_loss"] for row in read_rows(tmp_path / preset / "metrics.csv")]
        assert losses == pytest.approx(expected, rel=1e-4)
        alone = lba_exp.evaluate(tmp_path / preset, quiet=True)["forms"]["parallel"]
        assert alone["accuracy"] == pytest.approx(record["metrics"]["test"]["accuracy"], abs=2 / 512)


def test_throughput(tmp_path, data, capsys):
    """The batch of a device stays (the second GPU doubles the work), then the global batch stays (it halves the time)."""
    run = [*LARGE, "model.mixer.form=chunkwise", "trainer.precision=bf16-mixed", f"trainer.max_steps={STEPS}"]
    run += [f"trainer.val_check_interval={STEPS}", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    cases = {
        "1, 64 a device": ["data.global_batch_size=64"],
        "2 ddp, 64 a device": ["data.global_batch_size=128", "trainer=ddp", "trainer.devices=2"],
        "2 fsdp, 64 a device": ["data.global_batch_size=128", "trainer=fsdp", "trainer.devices=2"],
        "2 ddp, 64 in all": ["data.global_batch_size=64", "trainer=ddp", "trainer.devices=2"],
        "2 fsdp, 64 in all": ["data.global_batch_size=64", "trainer=fsdp", "trainer.devices=2"],
    }
    lines, base = [], None
    for name, overrides in cases.items():
        record = train(tmp_path / name.replace(", ", "_").replace(" ", "_"), data, *run, *overrides)
        cost = record["efficiency"]
        base = base or cost["tokens_per_second"]
        mfu = "" if cost["mfu"] is None else f"{100 * cost['mfu']:.1f} %"
        lines.append(
            f"{name:22}{cost['tokens_per_second']:12,.0f}{cost['tokens_per_second'] / base:8.2f}{cost['step_ms']:10.1f}"
            f"{cost['peak_memory_bytes'] / 2**30:10.2f}{cost['tflops_per_second']:10.1f}{mfu:>9}"
        )
        assert cost["tokens_per_second"] > 0 and record["status"] == "finished"
    with capsys.disabled():
        print(f"\n{record['environment']['device']}, torch {record['environment']['torch']}, {record['parameters']:,} parameters")
        print(f"{'GPUs':22}{'tokens/s':>12}{'times':>8}{'ms/step':>10}{'GiB':>10}{'TFLOP/s':>10}{'MFU':>9}")
        print("\n".join(lines))
