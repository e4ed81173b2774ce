"""The benchmark of one long sequence over several devices, with gloo and small shapes."""

import pytest
import torch

from lba_exp.bench.sequence import SequenceSettings, measure, run, show
from lba_exp.commands import bench
from lba_exp.errors import ConfigError
from tests.ranks import on_ranks

SETTINGS = SequenceSettings(length=101, check_length=37, heads=2, width=4, dtype="float64", repeats=2, device="cpu")


def process(rank):
    return measure(SETTINGS, torch.device("cpu"))


def test_two_ranks_against_one(tmp_path, capsys):
    first, second = on_ranks(process, tmp_path, 2)
    assert first == second and max(first["error"].values()) < 1e-10 and first["error"].keys() == {"y", "dq", "dk", "dv", "dgate"}
    one, two = first["rows"]
    assert (one["devices"], one["tokens"], two["devices"], two["tokens"]) == (1, 50, 2, 101)
    assert two["input_bytes"] == 51 * 2 * (4 * 4 + 1) * 8 < two["forward_bytes"] < two["both_bytes"] and one["both_ms"] > 0
    show(SETTINGS, first)
    assert "relative error at 37 tokens over 2 devices" in capsys.readouterr().out


def test_what_does_not_fit_is_one_sentence(capsys):
    with pytest.raises(ConfigError, match="--form chunky: give one of parallel"):
        run(SequenceSettings(form="chunky", device="cpu"))
    with pytest.raises(ConfigError, match="at least 3 tokens"):
        run(SequenceSettings(ranks=3, length=2, device="cpu"))
    with pytest.raises(SystemExit) as stopped:
        bench.main(["sequence", "--length", "none"])
    assert stopped.value.code == 1 and "--length none does not fit" in capsys.readouterr().err
