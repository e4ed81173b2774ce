"""A loss that is a mean over a number of targets that varies: on many devices and in many batches the same as in one."""

import pytest
import torch

from lba_exp.results.metrics_log import read_rows
from tests import forked
from tests.corpus import write_corpus
from tests.test_family import LM

# 240 blocks in global batches of 52, the last one of 32; the gradient as it is, not clipped
RUN = [*LM, "model=lion_s", "data.global_batch_size=52", "trainer.max_epochs=2", "trainer.gradient_clip_val=null"]
RUN += ["trainer.log_every_n_steps=1", "optim.lr=3e-3", "parity=off", "folder=run"]
LOSSES = ("train/step_loss", "train/loss", "train/accuracy", "val/loss", "val/accuracy")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("alone")
    code, answer = forked.run(folder, [*RUN, *corpus])
    assert (code, answer[0]) == (0, "record"), answer
    return curve(folder), checkpoint(folder), answer[1]


def curve(folder):
    return [{k: row[k] for k in LOSSES if k in row} for row in read_rows(folder / "run" / "metrics.csv")]


def checkpoint(folder):
    return torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)


WAYS = [("ddp", 2, 2), *(pytest.param(*way, marks=pytest.mark.slow) for way in (("ddp", 2, 1), ("fsdp2", 2, 2), ("auto", 1, 4)))]


@pytest.mark.parametrize(("strategy", "devices", "accumulate"), WAYS)
def test_every_target_counts_once(tmp_path, alone, corpus, strategy, devices, accumulate):
    run = [*RUN, *corpus, f"trainer.strategy={strategy}", f"trainer.accumulate_grad_batches={accumulate}"]
    answers = forked.run_on_many(tmp_path, run, devices)
    assert [code for code, _ in answers] == [0] * devices, answers
    expected, kept, record = alone
    rows = curve(tmp_path)
    assert len(rows) == len(expected) == 10
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert answers[0][1][1]["metrics"]["test"] == pytest.approx(record["metrics"]["test"], rel=1e-5)
    # AdamW's step is the same for gradients that are all off by one factor: its averages are not
    states, others = (c["optimizer_states"][0]["state"] for c in (checkpoint(tmp_path), kept))
    for number, state in others.items():
        torch.testing.assert_close(states[number]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_causal_model_is_sharded(tmp_path, corpus):
    causal = [*RUN, *corpus, "size=gpt_small", "model.width=32", "model.depth=2", "model.heads=2", "data.objective=causal"]
    code, answer = forked.run(tmp_path, causal)
    assert (code, answer[0]) == (0, "record"), answer
    expected = curve(tmp_path)
    (tmp_path / "many").mkdir()
    answers = forked.run_on_many(tmp_path / "many", [*causal, "trainer.strategy=fsdp2"])
    assert [code for code, _ in answers] == [0, 0], answers
    for row, other in zip(curve(tmp_path / "many"), expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)
