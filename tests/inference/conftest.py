"""Untrained models of every kind of data, saved as runs save theirs; the trained one is the whole suite's, ``finished``."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import lba_exp
from lba_exp import build
from lba_exp.callbacks.checkpoints import BEST, AtomicCheckpointIO
from tests import glue
from tests.corpus import write_corpus
from tests.test_family import LM, VIT

CAUSAL = ["model=lion_s", "size=gpt_small", "model.width=32", "model.depth=2", "model.heads=2", "data.objective=causal"]
TEXTS = ["model=lion_s_mlm", "model.width=32", "model.depth=2", "model.heads=2", "data.max_length=16", "data.batch_size=8"]


def save_run(folder: Path, overrides: list[str]) -> Path:
    """What a run leaves of its model: the checkpoint, by the parts that write it, and the configuration. Weights are drawn wide, so that
    inputs matter to predictions."""
    cfg = lba_exp.compose(overrides)
    data = build.data_module(cfg)
    task = build.task(cfg, data.spec)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    plain = OmegaConf.to_container(cfg, resolve=True)
    content = {"state_dict": task.state_dict(), "global_step": 0, "hyper_parameters": plain, type(data).__qualname__: data.state_dict()}
    task.on_save_checkpoint(content)
    AtomicCheckpointIO().save_checkpoint(content, folder / "checkpoints" / BEST)
    OmegaConf.save(cfg, folder / "config.yaml")
    return folder


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def places(tmp_path_factory) -> SimpleNamespace:
    """Run folders, and the data that they were trained on."""
    root = tmp_path_factory.mktemp("inference")
    glue.write_vocabulary(root)
    for task in ("rte", "stsb"):
        glue.write_hub(root / task, task)
    corpus = write_corpus(root / "corpus" / "texts", texts=60)
    trains = [overrides for overrides in corpus if not overrides.startswith("data.vocabulary")]
    runs = {
        "masked": [*LM, *corpus, "model=lion_s"],
        "causal": [*LM, *trains, "data.vocabulary_size=64", f"data.cache={root / 'cache'}", *CAUSAL],
        "pairs": [*TEXTS, "data=glue_rte", f"data.source={root / 'rte'}", f"data.vocabulary={root}"],
        "numbers": [*TEXTS, "data=glue_stsb", f"data.source={root / 'stsb'}", f"data.vocabulary={root}"],
        "towers": [*TEXTS, "model=lion_d", "data=glue_rte", "data.tokens=bytes", f"data.source={root / 'rte'}", "model.kind=two_towers"],
        "image": [*VIT, "model=lion_s_multiscan", "data.batch_size=256"],
        "softmax": ["model=softmax", "model.width=16", "model.depth=1", "model.heads=2", "data.batch_size=256"],
    }
    found = SimpleNamespace(root=root, corpus=root / "corpus" / "texts", vocabulary=root / "corpus" / "vocab.txt")
    for name, overrides in runs.items():
        setattr(found, name, save_run(root / name, overrides))
    return found


@pytest.fixture(scope="package")
def digits() -> np.ndarray:
    """40 of scikit-learn's digits, uint8 (40, 8, 8)."""
    from sklearn.datasets import load_digits

    return (load_digits().images[:40] * 15).astype(np.uint8)
