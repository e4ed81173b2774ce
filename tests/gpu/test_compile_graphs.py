"""Runs with compile=graphs against runs of the model as it is written, float32: each step's loss, validation and test.

`pytest -m gpu tests/gpu/test_compile_graphs.py`; the last test needs two GPUs. `pytest -m slow` goes the same way on the CPU, where the
models are compiled and nothing is recorded.
"""

from pathlib import Path

import pytest
import torch

import lba_exp
from lba_exp.results.metrics_log import read_rows
from tests.conftest import SMALL
from tests.corpus import write_corpus
from tests.gpu.test_two_devices import TWO_GPUS, losses, train
from tests.test_family import LM

ONE_GPU = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")]
STEPS = ["trainer.max_epochs=3", "trainer.log_every_n_steps=1", "trainer.num_sanity_val_steps=2", "trainer.limit_test_batches=1"]
STEPS += ["parity=off", "model.dropout=0", "optim.lr=1e-3", "trainer.precision=32-true"]
# batches of 500, 500 and 258: each shape is compiled, recorded and replayed; the average of the weights takes their place in validation
IMAGES = ["size=vit_tiny", "data=digits_images", "model=lion_s", "model.width=64", "model.depth=2", "model.heads=2", "model.patch_size=2"]
IMAGES += ["data.batch_size=500", "data.eval_batch_size=90", "optim.ema_decay=0.9"]
# several batches a step, of which the last one is smaller; the number of hidden tokens is another one in each
TEXT = ["model=lion_d", "model.depth=1", "model.mixer.form=chunkwise", "data.batch_size=64", "data.eval_batch_size=16"]
TEXT += ["trainer.limit_val_batches=2", "trainer.accumulate_grad_batches=2"]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=[pytest.param("gpu", marks=ONE_GPU), pytest.param("cpu", marks=pytest.mark.slow)])
def accelerator(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield request.param
    torch.compiler.reset()


def run(overrides, flag):
    """The metrics at the end, each step's loss, and that of each validation."""
    record = lba_exp.train(lba_exp.compose([*overrides, *STEPS, f"compile={flag}", f"folder=run_{flag}"]), quiet=True)
    rows = read_rows(Path(f"run_{flag}") / "metrics.csv")
    return record["metrics"], *([row[key] for row in rows if key in row] for key in ("train/step_loss", "val/loss"))


def compare(overrides, accelerator, steps):
    overrides = [*overrides, f"trainer.accelerator={accelerator}", "trainer.devices=1"]
    expected, expected_losses, expected_validation = run(overrides, "false")
    metrics, found, validation = run(overrides, "graphs")
    counted = torch._dynamo.utils.counters["inductor"]
    assert len(found) == steps and len(validation) == 3
    assert found == pytest.approx(expected_losses, rel=1e-4) and validation == pytest.approx(expected_validation, rel=1e-4)
    for split in ("validation", "test"):
        assert metrics[split] == pytest.approx(expected[split], rel=1e-4, abs=1 / 90)
    recorded, skipped = counted["cudagraph_recorded_non_static_inputs"], counted["cudagraph_skips"]
    assert recorded > 0 and not skipped if accelerator == "gpu" else not recorded


def test_images(accelerator):
    form = "fused" if accelerator == "gpu" else "chunkwise"
    compare([*SMALL, *IMAGES, f"model.mixer.form={form}"], accelerator, 9)


def test_masked_text(accelerator, tmp_path):
    compare([*LM, *write_corpus(tmp_path / "data" / "corpus"), *TEXT], accelerator, 6)


@pytest.mark.parametrize("accelerator", [pytest.param("gpu", marks=TWO_GPUS), pytest.param("cpu", marks=pytest.mark.slow)])
def test_two_devices(accelerator, tmp_path):
    """Gradients that are joined lie in the graph's memory, or, of several batches a step, beside it."""
    run = [*SMALL, *STEPS, "model.mixer.form=chunkwise", f"trainer.accelerator={accelerator}", "trainer.strategy=ddp"]
    run += ["optim.ema_decay=0.9", "data.batch_size=100", "data.eval_batch_size=45", "trainer.accumulate_grad_batches=2"]
    for flag in ("false", "graphs"):
        train(tmp_path / flag, [*run, f"compile={flag}"], devices=2)
    found, expected = losses(tmp_path / "graphs"), losses(tmp_path / "false")
    assert len(found) == 12 and found == pytest.approx(expected, rel=1e-4)
