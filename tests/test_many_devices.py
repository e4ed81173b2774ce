"""A run on two devices is the run on one: the same losses, and checkpoints that either goes on from."""

import signal

import pytest
import torch

import lba_exp
from lba_exp.data.loader import EpochOrder
from lba_exp.errors import ConfigError
from lba_exp.results import naming
from lba_exp.results.folder import read_record
from lba_exp.results.metrics_log import read_rows
from tests import forked, wandb_file
from tests.conftest import SMALL
from tests.test_family import VIT

# 1,258 training digits in global batches of 258, the last one not full
RUN = [
    *[o for o in SMALL if "batch_size" not in o],
    "data.global_batch_size=258",
    "model.dropout=0",
    "trainer.log_every_n_steps=1",
    "trainer.max_epochs=2",
    "checkpoint.every_n_steps=3",
    "folder=run",
]
LOSSES = ("train/step_loss", "train/loss", "val/loss", "val/accuracy", "train/accuracy")


def curve(folder):
    return [{k: row[k] for k in LOSSES if k in row} for row in read_rows(folder / "run" / "metrics.csv")]


def same(curve, other, tolerance=1e-5):
    assert len(curve) == len(other) == 10
    for row, expected in zip(curve, other, strict=True):
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    code, answer = forked.run(folder, RUN)
    assert (code, answer[0]) == (0, "record"), answer
    return folder, answer[1]


def finished(answers):
    assert [code for code, _ in answers] == [0] * len(answers), answers
    return answers[0][1][1]


def test_two_processes_give_the_losses_of_one(tmp_path, alone):
    record = finished(forked.run_on_many(tmp_path, [*RUN, "trainer.strategy=ddp", "logger=wandb_offline"]))
    same(curve(tmp_path), curve(alone[0]))
    assert len(wandb_file.runs(tmp_path / "run")) == 1 and wandb_file.read(tmp_path / "run")[2] == 0  # one W&B run, of the first process
    assert record["metrics"]["test"] == pytest.approx(alone[1]["metrics"]["test"], rel=1e-5)
    assert record["batch"] == {"per_device": 129, "devices": 2, "accumulated": 1, "global": 258}
    ours, theirs = record["efficiency"], alone[1]["efficiency"]
    assert ours["flops_per_step"] == theirs["flops_per_step"] > 0 and "largest of 2 devices" in ours["peak_memory_method"]
    assert record["parity"]["verdict"] == "pass" and record["parity"]["forms"]["recurrent"]["count"] == 359


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_run_moves_between_numbers_of_devices(tmp_path, alone, strategy, step):
    """Killed in mid-epoch on two devices, gone on with on one, killed again, gone on with on two."""
    many = [*RUN, f"trainer.strategy={strategy}"]
    answers = forked.run_on_many(tmp_path, many, kill=(1, ("on_train_batch_start", step)))
    assert answers[1][0] == -signal.SIGKILL and (read_record(tmp_path / "run") or {"status": "none"})["status"] != "finished"
    assert forked.run(tmp_path, RUN, ("on_train_batch_start", step + 1))[0] == -signal.SIGKILL
    finished(forked.run_on_many(tmp_path, many))
    same(curve(tmp_path), curve(alone[0]))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_that_diverges_on_two_devices_says_so_once(tmp_path, strategy):
    many = [*RUN, f"trainer.strategy={strategy}", "optim.lr=1e9", "optim.warmup_fraction=0", "trainer.gradient_clip_val=null"]
    (code, (kind, said)), other = forked.run_on_many(tmp_path, many)
    assert (code, kind, other) == (0, "error", (0, None)) and "the loss is nan at step 2 (epoch 1, batch 2" in said
    assert read_record(tmp_path / "run")["status"] == "failed"


PLANTED = """
from lba_exp.registry import TASKS
from lba_exp.tasks.classification import Classification

@TASKS.register("planted")
class Planted(Classification):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == 1 and self.global_step == 2:
            {}
        return loss
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_batch_that_diverges_on_one_device_is_named(tmp_path, strategy):
    """The other device has losses that are no numbers from the next step on."""
    (tmp_path / "planted.py").write_text(PLANTED.format('loss = loss * float("nan")'))
    many = [*RUN, f"trainer.strategy={strategy}", "plugins=[planted]", "task=planted", "trainer.log_every_n_steps=4"]
    (_, (kind, said)), (code, _) = forked.run_on_many(tmp_path, many)
    order = EpochOrder(1258, 129, seed=0, shuffle=True, drop_last=False, rank=1, world_size=2, equal_shards=True)
    samples = ", ".join(map(str, order.batches(0)[2][:8].tolist()))
    assert (kind, code) == ("error", 0)
    assert f"the loss is nan at step 3 (epoch 1, batch 3 on device 2 of 2, training samples {samples}, ...)" in said, said


@pytest.mark.slow
def test_a_process_that_fails_alone_is_a_sentence_on_each(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED.format("raise MemoryError"))
    many = [*RUN, "trainer.strategy=ddp", "plugins=[planted]", "task=planted"]
    first, second = forked.run_on_many(tmp_path, many)
    assert second == (0, ("error", second[1][1])) and "out of memory on the machine with 129 sequences a device" in second[1][1]
    assert first == (0, ("error", first[1][1])) and "another process of the run has ended" in first[1][1]
    assert read_record(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
def test_a_finished_run_is_shown_by_every_process(tmp_path):
    many = [*RUN, "trainer.strategy=ddp", "trainer.max_epochs=1", "parity=off"]
    finished(forked.run_on_many(tmp_path, many))
    assert all(answer[1]["already_finished"] for _, answer in forked.run_on_many(tmp_path, many))


def test_devices_make_another_run_unless_the_global_batch_is_given():
    alone, many = ["data.global_batch_size=64"], ["data.global_batch_size=64", "trainer=ddp", "trainer.devices=2", "trainer.num_nodes=2"]
    alone, many = (lba_exp.compose([*overrides, "trainer.max_epochs=2"]) for overrides in (alone, many))
    assert naming.folder(alone) == naming.folder(many) and naming.differences(alone, many) == {}
    alone, many = lba_exp.compose([]), lba_exp.compose(["trainer=ddp", "trainer.devices=2"])
    assert naming.folder(alone) != naming.folder(many)
    assert naming.differences(alone, many).keys() == {"trainer.devices", "trainer.strategy"}


def test_several_nodes_need_something_that_starts_them():
    with pytest.raises(ConfigError, match=r"trainer.num_nodes=2: start the command on every node with torchrun"):
        lba_exp.train(lba_exp.compose(["trainer.num_nodes=2", "folder=run"]), quiet=True)
    with pytest.raises(ConfigError, match="eval_batch_size=1 does not fit trainer=fsdp"):
        lba_exp.compose(["trainer=fsdp", "data.eval_batch_size=1"])


@pytest.mark.slow
def test_the_killed_first_process_is_gone_on_from(tmp_path, alone):
    many = [*RUN, "trainer.strategy=ddp"]
    assert forked.run_on_many(tmp_path, many, kill=(0, ("on_train_batch_start", 7)))[0][0] == -signal.SIGKILL
    finished(forked.run_on_many(tmp_path, many))
    same(curve(tmp_path), curve(alone[0]))


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5, 8])
def test_a_run_moves_between_sizes_of_a_batch(tmp_path, alone, step):
    """Killed inside an epoch or right after its end with whole batches, gone on with in thirds, killed again, gone on with in halves."""
    assert forked.run(tmp_path, RUN, ("on_train_batch_start", step))[0] == -signal.SIGKILL
    thirds = [*RUN, "trainer.accumulate_grad_batches=3"]
    assert forked.run(tmp_path, thirds, ("on_train_batch_start", step + 1))[0] == -signal.SIGKILL
    code, answer = forked.run(tmp_path, [*RUN, "trainer.accumulate_grad_batches=2"])
    assert code == 0 and answer[1]["batch"] == {"per_device": 129, "devices": 1, "accumulated": 2, "global": 258}
    same(curve(tmp_path), curve(alone[0]))


@pytest.mark.slow
def test_sharded_weights_give_the_losses_of_one_and_a_plain_checkpoint(tmp_path, alone):
    record = finished(forked.run_on_many(tmp_path, [*RUN, "trainer.strategy=fsdp2"]))
    same(curve(tmp_path), curve(alone[0]))
    assert record["parity"]["verdict"] == "pass"
    ours, theirs = (torch.load(f / "run/checkpoints/last.ckpt", weights_only=True) for f in (tmp_path, alone[0]))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, value in theirs["state_dict"].items():
        assert type(ours["state_dict"][key]) is torch.Tensor
        torch.testing.assert_close(ours["state_dict"][key], value, rtol=1e-4, atol=1e-5)
    ours, theirs = (c["optimizer_states"][0] for c in (ours, theirs))
    assert ours["param_groups"] == theirs["param_groups"]
    for number, state in theirs["state"].items():
        torch.testing.assert_close(ours["state"][number], state, rtol=1e-3, atol=1e-6)


def on_one_and_sharded(folder, overrides, *sharded):
    """The records of a run on one device and, with ``sharded`` overrides beside, cut in two, and both curves."""
    found = []
    for name, further, ranks in (("one", ["trainer.strategy=auto"], 1), ("two", ["trainer.strategy=fsdp2", *sharded], 2)):
        (folder / name).mkdir()
        record = finished(forked.run_on_many(folder / name, [*RUN, "trainer.max_epochs=1", *overrides, *further], ranks))
        found.append((record, curve(folder / name)))
    (one, expected), (two, rows) = found
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lion_d", "lion_d_hippo", "lion_d_multiscan"])
def test_the_decays_of_sharded_gates_are_on_record(tmp_path, model):
    """Learned decays a head and a channel; selective ones differ, as the first batch of two devices is another one."""
    image = [*VIT, "model.width=16"] if model == "lion_d_multiscan" else []
    records = on_one_and_sharded(tmp_path, [f"model={model}", *image, "parity=off"])
    ours, theirs = (record["decays"]["layers"] for record in records)
    assert [layer["layer"] for layer in ours] == [layer["layer"] for layer in theirs] and len(ours) == (4 if image else 1)
    for one, two in zip(ours, theirs, strict=True):
        for direction in ("forward", "backward"):
            torch.testing.assert_close(torch.tensor(two[direction]), torch.tensor(one[direction]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_sharded_blocks_are_compiled(tmp_path):
    one, two = on_one_and_sharded(tmp_path, ["model.depth=2"], "compile=true")
    assert two["parity"]["verdict"] == "pass" and two["efficiency"]["flops_per_step"] == one["efficiency"]["flops_per_step"]
    assert len(two["decays"]["layers"]) == 2
