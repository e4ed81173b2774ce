"""The table of presets: a row each, with figures that can be checked by hand, and errors that are seen."""

import pytest
import torch

from lba_exp.bench import presets
from lba_exp.errors import ConfigError
from lba_exp.ops import api

SMALL = ["model.width=8", "model.depth=1", "model.heads=2", "data.source=digits"]


def rows(*names):
    return list(presets.measure_presets(names, SMALL, samples=4, steps=1))


def test_a_row_has_size_forms_errors_and_time(capsys):
    found = rows("lion_d_multiscan", "softmax")
    linear, softmax = found
    assert linear["state_size"] == 2 * 2 * 2 * 4 * (4 + 1)  # scans, directions, heads, keys, values and z
    assert linear["parameters"] == softmax["parameters"] + 2 * 2  # two scans of two decays
    assert set(linear["forms"]) == {"parallel", "recurrent", "chunkwise"}
    assert linear["forms"]["parallel"]["logits"] == 0
    assert all(0 < errors["operator"] < 2e-5 and errors["logits"] < 1e-4 for errors in linear["forms"].values())
    assert softmax["forms"] == {} and softmax["state_size"] is None
    assert all(row["step_ms"] > 0 for row in found)
    presets.show(found)
    printed = capsys.readouterr().out
    assert "lion_d_multiscan" in printed and "one form only" in printed and "grows" in printed


def test_a_wrong_form_shows(monkeypatch):
    true = api._IMPLEMENTATIONS["recurrent"]

    def wrong(*args, **options):
        num, den = true(*args, **options)
        return num * 1.01, den

    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", wrong)
    errors = rows("lion_s")[0]["forms"]
    assert errors["recurrent"]["operator"] == pytest.approx(0.01, rel=0.1) and errors["recurrent"]["logits"] > 1e-4
    assert errors["chunkwise"]["operator"] < 2e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_named_and_threads_are_given_back(capsys):
    with pytest.raises(ConfigError, match="--device cuda: torch finds no GPU here"):
        presets.run(["softmax"], SMALL, device="cuda")
    before = torch.get_num_threads()
    presets.run(["softmax"], SMALL, threads=1)
    assert "CPU, 1 threads" in capsys.readouterr().out and torch.get_num_threads() == before


def test_an_unknown_preset_is_named():
    with pytest.raises(ConfigError, match=r"model=lion_x: .* did you mean"):
        rows("lion_x")


def test_growing_decays_have_one_form():
    torch.manual_seed(0)
    row = next(presets.measure_presets(["lion_s_hippo"], [*SMALL, "model.mixer.gate=softplus_vector"], samples=2, steps=1))
    assert row["forms"] == {}
