"""A run whose sequences are split over devices is the run on one: the same losses and metrics, each sample counted once."""

import signal
from types import SimpleNamespace

import pytest
import torch

import lba_exp
from lba_exp.callbacks.divergence import _samples
from lba_exp.data.loader import EpochOrder
from lba_exp.errors import ConfigError
from lba_exp.results import naming
from tests import forked
from tests.conftest import SMALL
from tests.test_family import VIT
from tests.test_many_devices import curve, finished, same

RUN = [
    *[o for o in SMALL if "batch_size" not in o],
    "data.global_batch_size=258",
    "model=lion_s",
    "model.dropout=0",
    "trainer.log_every_n_steps=1",
    "trainer.max_epochs=1",
    "folder=run",
]


def both(folder, overrides, devices=2, split=2, strategy="ddp", tolerance=1e-5):
    """The records of a run on one device and split, their curves compared row by row."""
    found = []
    many = [f"trainer.strategy={strategy}", f"sequence_parallel_size={split}"]
    for name, further, ranks in (("one", ["trainer.strategy=auto"], 1), ("many", many, devices)):
        (folder / name).mkdir()
        record = finished(forked.run_on_many(folder / name, [*RUN, *overrides, *further], ranks))
        found.append((record, curve(folder / name)))
    (one, expected), (two, rows) = found
    assert len(rows) == len(expected) > 1
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)
    assert two["metrics"]["test"] == pytest.approx(one["metrics"]["test"], rel=tolerance, abs=tolerance)
    assert two["batch"]["global"] == one["batch"]["global"]
    return one, two


def test_a_split_run_gives_the_losses_of_one_device(tmp_path):
    one, two = both(tmp_path, ["model.pooling=class_token", "checkpoint.every_n_steps=3"])
    assert two["efficiency"]["tokens_per_second"] > 0
    assert two["parity"]["applicable"] is False and "whole sequence" in two["parity"]["reason"]
    assert one["parity"]["verdict"] == "pass" and two["batch"]["per_device"] == 258
    kept = torch.load(tmp_path / "many" / "run" / "checkpoints" / "previous.ckpt", weights_only=True)  # of the third step
    assert float(kept["train_means"]["loss"]["samples"]) == 3 * 258
    checked = lba_exp.evaluate(tmp_path / "many" / "run", quiet=True)["forms"]
    assert all(figures["accuracy"] == pytest.approx(two["metrics"]["test"]["accuracy"]) for figures in checked.values())


SOME = "the cat sat on a mat and the dog ran to the sun while a bird sang"


@pytest.fixture
def text(tmp_path):
    words = sorted({*SOME.split()})
    (tmp_path / "vocabulary.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    (tmp_path / "texts").mkdir()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 12)) for i in range(1, 80)]
    (tmp_path / "texts" / "train.csv").write_text("text\n" + "\n".join(lines))
    run = ["task=language_modelling", "data=text", f"data.source={tmp_path / 'texts'}", f"data.vocabulary={tmp_path / 'vocabulary.txt'}"]
    return [*run, "data.max_length=8", "data.global_batch_size=16", "size=bert_mini", "model.width=16", "model.depth=1", "model.heads=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["model=lion_d", *VIT, "model.width=16"],
        ["model=lion_s_hippo", "model.norm=batch", "model.gradient_checkpointing=true", "trainer.precision=64-true"],
    ],
    ids=["image", "batch norm"],
)
def test_other_models_and_settings(tmp_path, overrides):
    both(tmp_path, overrides)


@pytest.mark.slow
def test_a_split_run_goes_on_on_one_device(tmp_path):
    """Killed in mid-epoch, with branches that samples skip: as the first of the devices draws them."""
    run = [*RUN, "model.drop_path=0.5", "model.depth=2", "checkpoint.every_n_steps=2", "trainer.max_epochs=2"]
    many = [*run, "trainer.strategy=ddp", "sequence_parallel_size=2"]
    assert forked.run_on_many(tmp_path, many, kill=(1, ("on_train_batch_start", 3)))[1][0] == -signal.SIGKILL
    (tmp_path / "one").mkdir()
    finished([forked.run(tmp_path, run), forked.run(tmp_path / "one", run)])
    same(curve(tmp_path), curve(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("devices,split,strategy", [(4, 2, "ddp"), (4, 4, "ddp"), (2, 2, "fsdp2"), (4, 2, "fsdp2")])
def test_targets_of_split_texts_count_once(tmp_path, text, devices, split, strategy):
    """Blocks of two to four tokens, some without a target; beside, two devices with batches of their own."""
    both(tmp_path, [*text, "trainer.accumulate_grad_batches=2"], devices, split, strategy)


@pytest.mark.parametrize(
    "overrides,said",
    [
        (["model=softmax"], "does not go with softmax attention"),
        (["model.mixer.scan=snake"], "scan=snake, which reads tokens in another order: give raster"),
        (["compile=true"], "compile=false"),
        (["parity=strict"], "parity=check"),
        (["trainer.strategy=deepspeed"], "give trainer=ddp or trainer=fsdp"),
    ],
)
def test_what_cannot_be_split_is_one_sentence(overrides, said):
    with pytest.raises(ConfigError, match=said):
        lba_exp.compose([*overrides, "sequence_parallel_size=2"])


def test_devices_that_do_not_divide_are_named():
    with pytest.raises(ConfigError, match="sequence_parallel_size=2 does not divide the number of devices, 1"):
        lba_exp.train(lba_exp.compose([*SMALL, "sequence_parallel_size=2", "folder=run"]), quiet=True)


def test_the_samples_of_devices_that_share_them_are_named():
    first, second = (
        EpochOrder(20, 3, seed=0, shuffle=True, drop_last=False, rank=rank, world_size=2, equal_shards=True) for rank in range(2)
    )
    trainer = SimpleNamespace(train_dataloader=SimpleNamespace(order=first), world_size=4)
    named = [_samples(trainer, 0, 1, device) for device in range(4)]
    assert named == [order.batches(0)[1].tolist() for order in (first, first, second, second)]


def test_split_sequences_make_no_other_run():
    alone, many = ["data.global_batch_size=64"], ["data.global_batch_size=64", "trainer=ddp", "sequence_parallel_size=2"]
    alone, many = (lba_exp.compose(overrides) for overrides in (alone, many))
    assert naming.folder(alone) == naming.folder(many) and naming.differences(alone, many) == {}
