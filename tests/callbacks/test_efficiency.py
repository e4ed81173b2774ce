"""What training costs: FLOPs against a count by hand, peaks, the time to an accuracy, what a checkpoint keeps."""

import json
import time
from pathlib import Path

import pytest
import torch

import lba_exp
from lba_exp import build
from lba_exp.callbacks.flops import peak_flops, training_flops
from lba_exp.results.metrics_log import read_rows

WIDTH, HIDDEN, DEPTH, LENGTH, HEADS, CLASSES = 16, 32, 2, 64, 2, 10
MODEL = [f"model.width={WIDTH}", f"model.depth={DEPTH}", f"model.heads={HEADS}", "trainer.accelerator=cpu"]


def count(*overrides):
    cfg = lba_exp.compose([*MODEL, *overrides])
    data = build.data_module(cfg)
    batch = next(iter(data.train_dataloader()))
    model = build.model(cfg.model, data.spec)
    return *training_flops(model, batch), model


def by_hand(gates: int) -> int:
    """Two operations a multiplication, three times for the backward pass; q, k, v, output, scores and values, MLP, gates; the rest once."""
    layer = 2 * LENGTH * WIDTH * (3 * WIDTH + WIDTH + gates) + 2 * 2 * LENGTH**2 * WIDTH + 2 * 2 * LENGTH * WIDTH * HIDDEN
    return 3 * (DEPTH * layer + 2 * LENGTH * WIDTH + 2 * WIDTH * CLASSES)


@pytest.mark.parametrize(("model", "gates"), [("lion_s", HEADS), ("lion_d", 0), ("lion_lit", 0), ("softmax", 0)])
def test_flops_are_those_counted_by_hand(model, gates):
    flops, how, _ = count(f"model={model}")
    assert flops == by_hand(gates) and how.startswith("3 x")


def test_forms_of_no_matrix_products_are_counted_in_the_linear_one():
    chunkwise = count("model.mixer.form=chunkwise", "model.mixer.chunk_size=16")
    recurrent = count("model.mixer.form=recurrent", "model.mixer.chunk_size=16")
    assert chunkwise[:2] == recurrent[:2] and chunkwise[1].endswith("in the form chunkwise")
    assert recurrent[2].form == "recurrent" and recurrent[2].training
    assert by_hand(HEADS) / 2 < chunkwise[0] < by_hand(HEADS)


def test_peaks_are_those_of_device_and_precision():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16-mixed") == (pytest.approx(989.4e12), "H100, 16 dense")
    assert peak_flops("NVIDIA H100 PCIe", "bf16-mixed")[0] == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "16-mixed")[0] == 312e12
    assert peak_flops("NVIDIA H200", "32-true")[0] == pytest.approx(66.9e12)
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops("NVIDIA H200", "32-true") == (pytest.approx(494.7e12), "H200, tf32 dense")
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, precision in (("cpu", "32-true"), ("NVIDIA GeForce", "bf16-mixed"), ("NVIDIA A100", "transformer-engine")):
        peak, reason = peak_flops(name, precision)
        assert peak is None and reason.startswith("no peak known")


def test_the_cost_of_a_run_is_on_record(small, capsys):
    overrides = [*small, "parity=off", "folder=run", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1"]
    record = lba_exp.train(lba_exp.compose([*overrides, "efficiency.target_accuracy=0.01"]))
    cost = json.loads(Path("run/result.json").read_text())["efficiency"]
    assert cost["flops_per_step"] % (2 * 256) == 0 and cost["mfu"] is None and cost["mfu_peak"] == "no peak known for cpu"
    each = cost["flops_per_step"] / 2 / 256 / LENGTH
    assert cost["tflops_per_second"] == pytest.approx(each * cost["tokens_per_second"] / 1e12)
    assert record["batch"] == {"per_device": 256, "devices": 1, "accumulated": 2, "global": 512}
    assert cost["steps_to_target"] == 3 and 0 < cost["seconds_to_target"] <= cost["train_seconds"]
    rows = read_rows(Path("run/metrics.csv"))
    assert rows[-1]["efficiency/steps_to_target"] == 3 and "efficiency/target_accuracy" not in rows[-1]
    said = capsys.readouterr().out
    assert "TFLOP/s" in said and "accuracy 1.00%" in said and "step 3" in said


def test_a_target_that_is_not_reached_is_said(small, capsys):
    record = lba_exp.train(lba_exp.compose([*small, "parity=off", "trainer.max_epochs=1", "efficiency.target_accuracy=1"]))
    assert record["efficiency"]["steps_to_target"] is None and "not reached" in capsys.readouterr().out


def test_what_compiling_takes_is_not_counted(small, monkeypatch):
    """A function that makes a graph, and takes its time, when it is called first, and records one when it is called for the fourth time."""
    calls = []

    def compiling(function):
        def run(*arguments):
            calls.append(torch.is_grad_enabled())
            if len(calls) in (1, 4):
                kind, name = ("stats", "unique_graphs") if len(calls) == 1 else ("inductor", "cudagraph_recorded_non_static_inputs")
                torch._dynamo.utils.counters[kind][name] += 1
                time.sleep(2)
            return function(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", compiling)
    record = lba_exp.train(lba_exp.compose([*small, "parity=off", "compile=true", "trainer.max_epochs=1"]), quiet=True)
    steps = 1258 // 256 + 1
    assert calls[:steps] == [True] * steps
    cost = record["efficiency"]
    assert cost["train_seconds"] < 2 and cost["step_ms"] == pytest.approx(1000 * cost["train_seconds"] / (steps - 2))
