"""The parity callback passes where the forms agree, fails where one is made wrong, and leaves training as it was."""

import json
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lba_exp import ops
from lba_exp.callbacks.parity import Parity
from lba_exp.errors import ConfigError, ParityError
from lba_exp.models.classifier import SequenceClassifier
from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.softmax import SoftmaxAttention
from lba_exp.ops import api

LENGTH, CLASSES = 12, 3
OTHERS = ("recurrent", "chunkwise")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Module(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def step(self, batch, _):
        return nn.functional.cross_entropy(self.model(batch["inputs"], batch.get("padding_mask")), batch["labels"])

    training_step = validation_step = test_step = step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def make_model(mixer=LinearAttention, dropout=0.1, depth=2, **options):
    torch.manual_seed(0)
    return SequenceClassifier(
        make_mixer=lambda layer: mixer(8, 2, **options),
        classes=CLASSES,
        width=8,
        depth=depth,
        channels=1,
        length=LENGTH,
        mlp_ratio=1.0,
        dropout=dropout,
    )


def make_loader(batches=2, seed=0, padded=False):
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(4 * batches):
        x = torch.randn(LENGTH, 1, generator=generator)
        sample = {"inputs": x, "labels": torch.randint(CLASSES, (), generator=generator)}
        samples.append(sample | ({"padding_mask": torch.arange(LENGTH) < LENGTH - 3} if padded else {}))
    return DataLoader(samples, batch_size=4)


def make_trainer(*callbacks, **options):
    settings = {"max_epochs": 2, "num_sanity_val_steps": 1, "devices": 1} | options
    return pl.Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(parity, model=None, **options):
    trainer, module = make_trainer(parity, **options), Module(model or make_model())
    trainer.fit(module, make_loader(), make_loader(seed=1))
    return trainer, module


def wrong_gate(form):
    right = api._IMPLEMENTATIONS[form]

    def implementation(q, k, v, forward, backward, **options):
        return right(q, k, v, forward.roll(1, dims=1), backward, **options)

    return implementation


def not_a_number(form):
    right = api._IMPLEMENTATIONS[form]

    def implementation(*args, **options):
        num, den = right(*args, **options)
        return num * math.nan, den

    return implementation


def diagonal_counted_twice(form):
    right = api._IMPLEMENTATIONS[form]
    return lambda *args, **options: right(*args, **(options | {"weight": 2.0}))


def test_all_forms_agree():
    parity = Parity("strict")
    trainer, module = fit(parity)
    trainer.test(module, make_loader(batches=3, seed=2), verbose=False)
    assert [entry["step"] for entry in parity.history] == [2, 4], "the sanity check is no validation"
    assert [entry["epoch"] for entry in parity.history] == [0, 1]

    record = json.loads(json.dumps(parity.record(), allow_nan=False))
    assert record["verdict"] == "pass" and record["split"] == "test" and record["reference"] == "parallel" and not record["failed"]
    assert list(record["forms"]) == ["parallel", "recurrent", "chunkwise"]
    for form, figures in record["forms"].items():
        assert figures["verdict"] == ("reference" if form == "parallel" else "pass")
        assert figures["count"] == 12, "the whole test split"
        assert figures["different"] == 0 and figures["agreement"] == 1
        assert figures["operator_rel"] < 2e-6 and figures["peak_bytes"] > 0 and figures["latency_ms"] > 0
        assert (figures["rel"] == 0) == (form == "parallel") and figures["rel"] < 1e-5
        assert figures["native_rel"] == figures["rel"], "the run's precision is float32"
    assert record["memory_method"] == "live tensors"
    assert record["worst"]["rel"] == max(e["forms"][f]["rel"] for e in parity.history for f in OTHERS)


def test_accuracy_is_that_of_the_form(monkeypatch):
    parity = Parity("check", full=True)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", not_a_number("recurrent"))
    trainer, module = make_trainer(parity, max_epochs=1), Module(make_model(depth=1))
    loader = make_loader(batches=3, seed=1)
    with pytest.warns(UserWarning, match="recurrent"):
        trainer.fit(module, make_loader(), loader)
    with torch.no_grad():
        right = sum(int((module.model.eval()(b["inputs"]).argmax(-1) == b["labels"]).sum()) for b in loader)
        zeros = sum(int((b["labels"] == 0).sum()) for b in loader)  # the largest of NaNs is the first
    forms = parity.last["forms"]
    assert forms["parallel"]["accuracy"] == forms["chunkwise"]["accuracy"] == right / 12
    assert forms["recurrent"]["accuracy"] == zeros / 12


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("fault", [wrong_gate, diagonal_counted_twice, not_a_number])
def test_planted_bugs_are_caught(monkeypatch, fault, full):
    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", fault("recurrent"))
    with pytest.raises(ParityError, match=r"against the form parallel: form recurrent: relative error .* exceeds 0.0001"):
        fit(Parity("strict", full=full), make_model(depth=1))

    parity = Parity("check", full=full)
    with pytest.warns(UserWarning, match="form recurrent: relative error") as caught:
        fit(parity, make_model(depth=1))
    assert len([w for w in caught if "parity at step" in str(w.message)]) == 2, "one warning a validation"
    record = json.loads(json.dumps(parity.record(), allow_nan=False))
    assert record["verdict"] == "fail" and [f["step"] for f in record["failed"]] == [2, 4]
    assert record["forms"]["recurrent"]["verdict"] == "fail" and record["forms"]["chunkwise"]["verdict"] == "pass"
    assert record["worst"]["form"] == "recurrent"
    if fault is not_a_number:
        assert record["forms"]["recurrent"]["rel"] is None and math.isnan(parity.metrics()["parity/recurrent/rel"])


@pytest.mark.parametrize("full", [False, True])
def test_a_form_that_raises_fails(monkeypatch, full):
    def raises(*args, **options):
        raise ValueError("planted")

    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", raises)
    parity = Parity("check", full=full)
    with pytest.warns(UserWarning, match="form recurrent: raised ValueError"):
        fit(parity, max_epochs=1)
    assert parity.record()["forms"]["recurrent"]["verdict"] == "fail" == parity.record()["verdict"]
    assert parity.record()["forms"]["chunkwise"]["verdict"] == "pass"


def test_a_bug_in_the_form_that_trains_is_caught(monkeypatch):
    """Held against float64: here the recurrent form is the reference, and wrong."""
    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", diagonal_counted_twice("recurrent"))
    with pytest.raises(ParityError, match=r"form recurrent: relative error \S+ of the operator"):
        fit(Parity("strict"), make_model(form="recurrent"))


def test_a_bug_that_only_the_operator_shows(monkeypatch):
    """A fault too small for the logits' tolerance is still seen in the operator."""
    right = api._IMPLEMENTATIONS["chunkwise"]

    def implementation(*args, **options):
        num, den = right(*args, **options)
        return num * (1 + 5e-5), den

    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunkwise", implementation)
    with pytest.raises(ParityError, match="form chunkwise: relative error 5e-05 of the operator exceeds 2e-05"):
        fit(Parity("strict"))
    fit(Parity("strict", operator_tolerance=1e-4))


def test_planted_bug_is_caught_on_test(monkeypatch):
    parity = Parity("strict", full_test=False)
    trainer, module = fit(parity)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunkwise", diagonal_counted_twice("chunkwise"))
    with pytest.raises(ParityError, match="parity on test"):
        trainer.test(module, make_loader(seed=2), verbose=False)
    assert parity.record()["verdict"] == "fail" and parity.metrics()["test/parity/chunkwise/count"] == 4


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_is_not_disturbed(full, precision):
    """Weights and the generator after training with dropout are those of a run without the callback; flags and form too."""

    class Watch(pl.Callback):
        def on_validation_batch_start(self, trainer, module, *args):
            self.before = self.state(module)

        def on_validation_end(self, trainer, module):
            assert trainer.sanity_checking or self.state(module) == self.before

        def state(self, module):
            flags = [m.training for m in module.modules()]
            return flags, module.model.form, torch.get_rng_state().tolist(), [p.grad is None for p in module.parameters()]

    def run(*callbacks):
        model = make_model(dropout=0.5)
        torch.manual_seed(1)
        # validation inside the epoch, while gradients are being accumulated
        trainer = make_trainer(*callbacks, val_check_interval=1, accumulate_grad_batches=2, precision=precision)
        trainer.fit(Module(model), make_loader(), make_loader(seed=1))
        return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights, state = run()
        weights_watched, state_watched = run(Watch(), Parity("strict", full=full))
    assert torch.equal(state, state_watched)
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_watched, strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_judged_in_float32(monkeypatch, precision):
    """A form that is off in bfloat16 alone passes, and its error there is on record."""
    right = ops.bidirectional_linear_attention

    def operator(*args, form, **options):
        y = right(*args, form=form, **options)
        return y * 2 if form == "recurrent" and y.dtype == torch.bfloat16 else y

    monkeypatch.setattr(ops, "bidirectional_linear_attention", operator)
    parity = Parity("strict")
    fit(parity, precision=precision)
    figures = parity.last["forms"]["recurrent"]
    assert figures["rel"] < 1e-5 and figures["operator_rel"] < 2e-6 and figures["native_rel"] > 1e-2
    assert parity.last["precision"] == precision


def test_reference_is_the_form_trained_in():
    parity = Parity("strict", forms=("parallel",))
    fit(parity, make_model(form="chunkwise", chunk_size=5))
    assert list(parity.last["forms"]) == ["chunkwise", "parallel"] and parity.last["reference"] == "chunkwise"
    with pytest.raises(ConfigError, match="no form 'recurent'"):
        fit(Parity(forms=("recurent",)))


@pytest.mark.parametrize("options", [{"feature_map": "identity"}, {"scale": "none"}, {"gate": "none"}, {"gate": "fixed"}])
def test_variants_pass(options):
    fit(Parity("strict"), make_model(**options), max_epochs=1)


def test_padding():
    parity = Parity("strict")
    make_trainer(parity).fit(Module(make_model()), make_loader(padded=True), make_loader(seed=1, padded=True))
    assert parity.record()["verdict"] == "pass"


@pytest.mark.parametrize("full", [False, True])
def test_a_form_over_the_budget_is_skipped(monkeypatch, full):
    def estimate(form, *shape, itemsize=4):
        assert shape[1:] == (LENGTH, 2, 4, 4)
        return 2**30 * (5 if form == "chunkwise" and shape[0] > 1 else 1)

    monkeypatch.setattr(ops, "estimate_bytes", estimate)
    parity = Parity("strict", full=full)
    fit(parity)
    skipped = parity.record()["forms"]["chunkwise"]
    assert skipped == {"verdict": "skipped", "reason": "needs an estimated 5 GiB for a batch of 4, more than the budget of 4 GiB"}
    assert parity.record()["forms"]["recurrent"]["verdict"] == "pass"
    assert not [key for key in parity.metrics() if "chunkwise" in key]

    alone = Parity("strict", forms=("chunkwise",), full=full)
    fit(alone)
    assert alone.record()["verdict"] == "not compared", "nothing compared is no pass"


def test_softmax_is_not_applicable():
    parity = Parity("strict")
    trainer, module = fit(parity, make_model(SoftmaxAttention))
    trainer.test(module, make_loader(), verbose=False)
    record = parity.record()
    assert record["applicable"] is False and record["reason"]
    assert [*record["forms"]] == ["-"] and record["forms"]["-"]["latency_ms"] > 0 and record["forms"]["-"]["peak_bytes"] > 0
    assert json.dumps(record)


def test_nothing_measured_yet():
    assert Parity().metrics() == {} and Parity().record()["verdict"] == "not compared"
    with pytest.raises(ValueError, match="mode"):
        Parity("warn")


def test_metrics_are_numbers():
    parity = Parity()
    fit(parity)
    metrics = parity.metrics()
    assert all(type(value) is float for value in metrics.values())
    names = {"max_abs", "rel", "agreement", "near_ties", "accuracy", "latency_ms", "peak_bytes", "operator_rel", "native_rel"}
    assert names <= {key.removeprefix("parity/recurrent/") for key in metrics}


def test_state_round_trip(tmp_path):
    parity = Parity()
    trainer, module = fit(parity)
    torch.save(parity.state_dict(), tmp_path / "state.pt")
    restored = Parity()
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.history == parity.history and restored.record() == parity.record() and restored.metrics() == parity.metrics()

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Parity()
    make_trainer(resumed, max_epochs=3).fit(module, make_loader(), make_loader(seed=1), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert [entry["step"] for entry in resumed.history] == [2, 4, 6]


def test_testing_a_checkpoint_keeps_the_history(tmp_path):
    parity = Parity()
    trainer, module = fit(parity, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    trainer, module = fit(parity, module.model, max_epochs=2)
    before = list(parity.history)
    trainer.test(module, make_loader(), ckpt_path=tmp_path / "first.ckpt", verbose=False, weights_only=True)
    assert parity.history == before and len(before) == 3


@pytest.mark.parametrize("faulty_rank", [None, 1])
def test_ranks_agree_on_the_verdict(tmp_path, faulty_rank, monkeypatch):
    """The verdict, by which ``strict`` raises, is the same on both ranks where one alone is faulty; the samples of both are counted."""
    right = api._IMPLEMENTATIONS["recurrent"]

    def on_one_rank(*args, **options):
        faulty = torch.distributed.is_initialized() and torch.distributed.get_rank() == faulty_rank
        return right(*args, **(options | {"weight": 2.0} if faulty else options))

    class Report(pl.Callback):
        def on_validation_end(self, trainer, module):
            (tmp_path / str(trainer.global_rank)).write_text(json.dumps(parity.record()))

    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", on_one_rank)
    parity = Parity("check")
    trainer = make_trainer(parity, Report(), max_epochs=1, num_sanity_val_steps=0, devices=2, strategy="ddp_fork")
    trainer.fit(Module(make_model()), make_loader(4), make_loader(4, seed=1))
    for rank in ("0", "1"):
        record = json.loads((tmp_path / rank).read_text())
        assert record["forms"]["recurrent"]["count"] == 8
        assert record["forms"]["chunkwise"]["verdict"] == "pass"
        assert record["verdict"] == record["forms"]["recurrent"]["verdict"] == ("pass" if faulty_rank is None else "fail")
