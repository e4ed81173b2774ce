"""The picture of a run: what is drawn, from rows with gaps."""

import math
import struct
import warnings

import pytest

from lba_exp.results.figures import draw_run, run_figure

ROWS = [
    {"step": 10, "train/step_loss": 2.3},
    {"step": 20, "epoch": 0, "train/loss": 2.0, "val/loss": "1.9", "train/accuracy": 0.2, "val/accuracy": 0.3},
    {"step": 20, "parity/parallel/rel": 0.0, "parity/recurrent/rel": 2e-7, "parity/chunkwise/rel": 0.0},
    {"step": 40, "train/loss": 1.0, "val/loss": "", "val/accuracy": None, "optim/lr": 1e-3},
    {"step": 40, "parity/parallel/rel": 0.0, "parity/recurrent/rel": "nan", "parity/chunkwise/rel": 1e-7},
    {"step": 60, "parity/parallel/rel": 0.0, "parity/recurrent/rel": 0.2, "parity/chunkwise/rel": 3e-7},
]


def panels(figure):
    return {axes.get_title(loc="left").split(":")[0]: {line.get_label(): line for line in axes.lines} for axes in figure.axes}


def test_lines():
    drawn = panels(draw_run(ROWS, "a run", 1e-4))
    assert list(drawn) == ["Loss", "Accuracy", "Parity"]
    assert list(drawn["Loss"]["train"].get_ydata()) == [2.0, 1.0]
    assert list(drawn["Loss"]["validation"].get_xdata()) == [20] and list(drawn["Loss"]["validation"].get_ydata()) == [1.9]
    assert list(drawn["Accuracy"]["validation"].get_ydata()) == [0.3]


def test_parity_panel():
    figure = draw_run(ROWS, "a run", 1e-4)
    axes, lines = figure.axes[-1], panels(figure)["Parity"]
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low < 1e-7 and high > 0.2
    recurrent = list(lines["recurrent"].get_ydata())
    assert recurrent[0] == 2e-7 and math.isnan(recurrent[1]) and recurrent[2] == 0.2
    assert list(lines["recurrent: not finite"].get_xdata()) == [40] and list(lines["recurrent: not finite"].get_ydata()) == [high]
    assert list(lines["chunkwise: exactly 0"].get_xdata()) == [20] and list(lines["chunkwise: exactly 0"].get_ydata()) == [low]
    assert "parallel" not in lines and "parallel: exactly 0" in lines
    assert [line for line in lines.values() if list(line.get_ydata()) == [1e-4, 1e-4]], "the tolerance"
    assert [text.get_text() for text in axes.texts] == ["tolerance 0.0001"]


@pytest.mark.parametrize(
    "rows", [ROWS, [], [{"step": 3, "train/loss": 1.0}], [{"step": 1, "parity/recurrent/rel": 0.0}], [{"val/loss": 1.0}]]
)
def test_a_png_whatever_is_missing(tmp_path, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = run_figure(rows, tmp_path / "run.png", "a run", 1e-4)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 600 and height >= 500


def test_state_of_pyplot_is_untouched(tmp_path):
    import sys

    before = "matplotlib.pyplot" in sys.modules
    run_figure(ROWS, tmp_path / "run.png", "a run")
    assert ("matplotlib.pyplot" in sys.modules) == before
