"""Shared settings of the tests: no network, no colour, few threads."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script's shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["NO_COLOR"] = "1"

import pytest
import torch

# asks NVML, so that processes may still be forked; Triton reads the setting where kernels are first imported
if not torch.cuda.device_count():
    os.environ["TRITON_INTERPRET"] = "1"

SMALL = [
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "data.batch_size=256",
    "logger=csv",
    "threads=1",
]


@pytest.fixture
def small() -> list[str]:
    """Overrides of a run that takes about a second."""
    return list(SMALL)


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so that nothing it writes stays."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of LION-S and its record."""
    import lba_exp

    folder = tmp_path_factory.mktemp("finished") / "run"
    record = lba_exp.train(lba_exp.compose([*SMALL, f"folder={folder}"]), quiet=True)
    return folder, record
