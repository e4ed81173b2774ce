"""What is printed at the start and at the end of a run, at any width and without a terminal."""

import io

import pytest
from rich.console import Console

from lba_exp.results import screen

FOLDER = "/data/somebody/" + "a_long_name/" * 12 + "seed_0"
PASS = {
    "max_abs": 1e-6,
    "rel": 2.3e-7,
    "agreement": 1.0,
    "different": 0,
    "near_ties": 1,
    "accuracy": 0.9722,
    "count": 1360,
    "native_rel": 2e-7,
    "operator_rel": 9.1e-8,
    "latency_ms": 12.34,
    "peak_bytes": 12345678,
    "verdict": "pass",
    "reason": None,
}


def record(**changes):
    forms = {
        "parallel": PASS | {"rel": 0.0, "verdict": "reference"},
        "recurrent": PASS | {"latency_ms": 54321.0, "peak_bytes": None},
        "chunkwise": {"verdict": "skipped", "reason": "needs an estimated 5 GiB"},
    }
    parity = {
        "applicable": True,
        "mode": "check",
        "reference": "parallel",
        "split": "test",
        "tolerance": 1e-4,
        "operator_tolerance": 2e-5,
        "memory_method": "live tensors",
        "verdict": "pass",
        "forms": forms,
        "worst": {"step": 120, "epoch": 3, "form": "recurrent", "rel": 4e-7},
        "failed": [],
    }
    return {
        "status": "finished",
        "variant": "lion_s",
        "seed": 0,
        "folder": FOLDER,
        "metrics": {"train": {}, "validation": {"accuracy": 0.98, "loss": 0.07}, "test": {"accuracy": 0.9722, "loss": 0.1}},
        "best": {"epoch": 33, "step": 1234, "monitor": "val/accuracy"},
        "parity": parity,
        "parameters": 78602,
        "state_size": 4352,
        "efficiency": {
            "tokens_per_second": 123456.7,
            "step_ms": 31.2,
            "peak_memory_bytes": 912345678,
            "peak_memory_method": "peak resident set",
            "train_seconds": 83.2,
            "wall_seconds": 121.0,
        },
    } | changes


def printed(function, *args, width=80):
    console = Console(file=io.StringIO(), width=width)
    function(*args, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [20, 80, 200])
def test_nothing_is_cut(width):
    text = printed(screen.end_table, record(), width=width)
    lines = text.splitlines()
    rows = {
        line.split()[0]: line.split() for line in lines if line.split()[:1] and line.split()[0] in ("parallel", "recurrent", "chunkwise")
    }
    assert rows["parallel"] == ["parallel", "97.22%", "100.00%", "0", "9.1e-08", "12.3", "ms", "11.8", "MiB", "reference"]
    assert rows["recurrent"] == ["recurrent", "97.22%", "100.00%", "2.3e-07", "9.1e-08", "54,321", "ms", "pass"], "an empty cell for memory"
    words = " ".join(text.split())
    for expected in (
        "chunkwise skipped: needs an estimated 5 GiB.",
        "over 1,360 test samples; 1 near tie left out of agreement; memory of one batch, by live tensors",
        "lion_s, seed 0",
        "accuracy 98.00%, loss 0.0700",
        "step 1,234, epoch 34",
        "pass, largest error 4.0e-07 (recurrent, step 120)",
        "78,602",
        "4,352 numbers",
        "1 min 23 s, 2 min 1 s in all",
        "123,457 tokens/s, 31.2 ms per step",
        "870.1 MiB (peak resident set)",
    ):
        assert expected in words
    assert lines[-1].split() == ["run", "folder", FOLDER], "the path last, in one piece"
    assert "…" not in text and "\x1b" not in text


def test_a_usual_table_fits_80_columns():
    assert all(len(line.rstrip()) <= 80 for line in printed(screen.end_table, record(folder="runs/a")).splitlines())


def test_without_other_forms():
    text = printed(screen.end_table, record(parity={"applicable": False, "reason": "one form only"}, form=None))
    assert "Parity does not apply: one form only." in text and "97.22%" in text
    assert "97.22%" in printed(screen.end_table, record(parity=None, form="parallel"))
    cost = {"applicable": False, "reason": "one form only", "memory_method": "m", "forms": {"-": {"latency_ms": 12.34, "peak_bytes": 2048}}}
    row = next(line for line in printed(screen.end_table, record(parity=cost, form=None)).splitlines() if "12.3 ms" in line)
    assert row.split() == [record()["variant"], "97.22%", "12.3", "ms", "2.0", "KiB"]


def test_failures_are_named():
    parity = record()["parity"]
    parity["forms"]["recurrent"] = PASS | {"verdict": "fail", "rel": None, "reason": "relative error nan"}
    assert "recurrent failed: relative error nan." in printed(screen.end_table, record(parity=parity))
    parity = record()["parity"] | {"failed": [{"split": "validation", "sentence": "parity at step 3: wrong."}], "verdict": "fail"}
    assert "Failed earlier in the run, 1 times: parity at step 3: wrong." in " ".join(
        printed(screen.end_table, record(parity=parity)).split()
    )


def test_an_unfinished_record():
    text = printed(screen.end_table, {"status": "failed", "folder": "runs/a", "efficiency": None, "best": {}, "parity": None})
    assert text.splitlines()[-1].split() == ["run", "folder", "runs/a"]


def test_start():
    config = {
        "seed": 3,
        "nothing": None,
        "root": FOLDER,
        "model": {"name": "lion_s", "mixer": {"kind": "[bold]", "options": {}}},
        "tags": [],
    }
    text = printed(screen.start_panel, config, 1234567)
    assert "seed: 3" in text and FOLDER in text and "name: lion_s" in text and "kind: [bold]" in text and "1,234,567" in text
    assert "nothing" not in text


def test_numbers():
    assert screen.percent(0.99999) == "99.99%" and screen.percent(1.0) == "100.00%" and screen.percent(None) == ""
    assert screen.scientific(0.0) == "0" and screen.scientific(1.26e-7) == "1.3e-07" and screen.scientific(None) == ""
    assert [screen.binary_size(x) for x in (None, 0, 1023, 1024, 3 * 2**30)] == ["", "0 B", "1023 B", "1.0 KiB", "3.0 GiB"]
    assert [screen.seconds(x) for x in (None, 0.44, 59.9, 60, 3725)] == [None, "0.4 s", "59.9 s", "1 min 0 s", "1 h 2 min"]
