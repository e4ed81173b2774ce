"""`lba-bench tune`: candidates side by side in Triton's interpreter, the fastest kept."""

import pytest
import torch

from lba_exp.bench import tune
from lba_exp.commands import bench as command
from lba_exp.errors import ConfigError
from lba_exp.ops.fused import operator

pytestmark = pytest.mark.skipif(not operator.INTERPRETED, reason="needs Triton's interpreter, which does not run on a GPU")
SETTINGS = tune.TuneSettings(("float32",), (64,), tokens=20, heads=1, seconds=1e-3, repeats=1)


@pytest.fixture
def small(monkeypatch):
    from lba_exp.ops.fused import candidates

    listed = {
        (kind, "full", 64, "short"): (candidates.Plan(16, 16, 16, 4, 1, 16, 4, 1), candidates.Plan(32, 16, 32, 4, 1, 32, 4, 1))
        for kind in ("forward", "backward", "linear")
    }
    monkeypatch.setattr(candidates, "CANDIDATES", listed)
    monkeypatch.setattr(tune, "LENGTHS", {"short": 20})
    return listed


def test_all_candidates_are_timed_and_agree(small):
    found = dict(tune.measure(SETTINGS, torch.device("cpu")))
    assert found.keys() == small.keys()
    for key, cells in found.items():
        assert [cell["plan"] for cell in cells] == list(small[key])
        assert all(cell["reason"] is None and cell["median_ms"] > 0 for cell in cells)


def test_one_whose_results_differ_or_that_fails_is_never_kept(small, monkeypatch):
    call = tune.call

    def faulty(key, plan, *rest):
        once = call(key, plan, *rest)
        if plan != small[key][1]:
            return once
        if key[0] == "linear":
            return lambda: 1 / 0
        return lambda: [1.01 * y for y in once()]

    monkeypatch.setattr(tune, "call", faulty)
    for key, cells in tune.measure(SETTINGS, torch.device("cpu")):
        assert tune.pick(cells) is cells[0] and cells[1]["median_ms"] is None
        assert ("ZeroDivisionError" if key[0] == "linear" else "its results differ by") in cells[1]["reason"]


def test_a_gain_within_the_noise_keeps_the_first():
    cells = [{"plan": n, "median_ms": ms, "reason": None} for n, ms in enumerate((1.0, 0.99, None))]
    assert tune.pick(cells) is cells[0]
    cells[1]["median_ms"] = 0.9
    assert tune.pick(cells) is cells[1]
    with pytest.raises(ConfigError, match="no candidate of the fused form runs on this GPU: too small"):
        tune.pick([{"plan": 0, "median_ms": None, "reason": "too small"}])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "tune times kernels of a GPU, and torch finds none here."),
        (["--widths", "32"], "--widths: unknown a width"),
        (["--seconds", "0"], "--seconds 0 does not fit: give a number above 0."),
    ],
)
def test_mistakes(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        command.main(["tune", *words])
    said = capsys.readouterr().err
    assert exit.value.code == 1 and message.split(":")[0] in said
