"""The figures of ``lba-bench model``: what is drawn, drawn again later, and what is said where nothing can be."""

import json
import sys

import pytest

from lba_exp.bench import drawing, model_figure
from lba_exp.bench.pace import OVER
from lba_exp.commands import bench

EMPTY = {"chunk_size": None, "median_ms": None, "peak_bytes": None, "estimated_ms": None, "batch": 1}


def cell(model, form, size, status="measured", **others):
    own = {"median_ms": size / 10, "peak_bytes": size * 2**20} if status == "measured" else {}
    return EMPTY | {"model": model, "form": form, "length": size, "tokens": size, "status": status} | own | others


def record(cells, axis="length"):
    return {
        "kind": drawing.MODEL,
        "status": "finished",
        "command": "lba-bench model some words",
        "git": {"commit": "0123456789", "dirty": False},
        "environment": {"device": "a device", "torch": "2"},
        "settings": {"axis": axis, "dtype": "float32"},
        "cells": cells,
    }


def lines(figure, panel=0):
    return {x.get_label(): x for x in figure.axes[panel].get_lines() if not x.get_label().startswith("_")}


def hollow(figure):
    return [x for x in figure.axes[0].get_lines() if x.get_markerfacecolor() == "white" and len(x.get_xdata())]


def test_memory_and_time_by_length():
    estimated = {"estimated_ms": 70.0, "peak_bytes": 8 * 2**20}
    cells = [
        *(cell("softmax", None, n) for n in (256, 512)),
        cell("softmax", None, 1024, "out of memory"),
        *(cell("lion_s", "recurrent", n) for n in (256, 512)),
        cell("lion_s", "recurrent", 1024, OVER, **estimated),
        cell("lion_s", "recurrent", 2048, OVER),
        *(cell("lion_s", "parallel", n, "not available here") for n in (256, 512)),
    ]
    found = model_figure.figures(record(cells))
    assert [*found] == ["memory_length", "time_length"], "one form is no comparison of forms"
    memory, time = found["memory_length"], found["time_length"]
    assert [*lines(memory)] == ["softmax", "lion_s, recurrent", "out of memory"]
    assert [*lines(memory)["lion_s, recurrent"].get_xdata()] == [256, 512, 1024]
    assert [*lines(memory)["lion_s, recurrent"].get_ydata()] == [256, 512, 8] and hollow(memory) == []
    assert [*lines(time)["lion_s, recurrent"].get_ydata()] == [25.6, 51.2, 70]
    (mark,) = hollow(time)
    assert ([*mark.get_xdata()], [*mark.get_ydata()]) == ([1024], [70]) and "time estimated, see table" in lines(time)
    assert [(x.get_text(), x.xy[0]) for x in memory.axes[0].texts] == [("×", 1024)]
    text = memory._supxlabel.get_text()
    assert "lba-bench model some words" in text and "a device, float32, torch 2, commit 0123456" in text


def test_forms_against_each_other():
    cells = [cell(model, form, n) for n in (256, 512) for model in ("lion_s", "lion_lit") for form in ("parallel", "recurrent")]
    found = model_figure.figures(record([*cells, cell("lion_s", "fused", 512, OVER, estimated_ms=3.0, peak_bytes=2**20)]))
    assert [*found] == ["memory_length", "time_length", "forms"]
    drawn = lines(found["forms"])
    assert [*drawn["lion_lit, recurrent"].get_xdata()] == [25.6, 51.2] and [*drawn["lion_lit, recurrent"].get_ydata()] == [256, 512]
    assert len({x.get_color() for name, x in drawn.items() if "," in name}) == 6, "five lines and the mark's own words"


def test_more_lines_than_colours_have_strokes():
    forms = ("parallel", "recurrent", "chunkwise", "fused")
    cells = [cell(model, form, n) for n in (256, 512) for model in ("lion_s", "lion_lit") for form in forms]
    drawn = lines(model_figure.figures(record(cells))["memory_length"])
    assert len(drawn) == 8 and len({(x.get_color(), str(x._unscaled_dash_pattern)) for x in drawn.values()}) == 8
    assert len({x.get_color() for x in drawn.values()}) == 4


def test_the_size_of_a_chunk():
    chunks = [cell("lion_s", "chunkwise", n, chunk_size=size) for n in (256, 512) for size in (16, 64)]
    chunks.append(cell("lion_s", "chunkwise", 1024, chunk_size=64))
    found = model_figure.figures(record([*chunks, cell("lion_s", "recurrent", 512), cell("lion_s", "recurrent", 256)]))
    assert "forms" not in found
    figure = found["chunk_size"]
    assert "at 512 tokens" in figure.axes[0].get_title("left"), "the largest size that has all chunks"
    for panel, level in ((0, 512), (1, 51.2)):
        drawn = lines(figure, panel)
        assert [*drawn["lion_s, chunkwise"].get_xdata()] == [16, 64] and [*drawn["lion_s, chunkwise"].get_ydata()] == [level, level]
        assert {*drawn["lion_s, recurrent"].get_ydata()} == {level}
    assert "lion_s, chunkwise 64" in lines(found["time_length"])


def measure(folder, code=0):
    tiny = ("model.width=8", "model.depth=1", "model.heads=2", "--lengths=8,16", "--forms=parallel,recurrent")
    with pytest.raises(SystemExit) as end:
        bench.main(["model", "lion_d", *tiny, "--device=cpu", "--threads=1", "--repeats=1", "--seconds=0.001", f"--output={folder}"])
    assert end.value.code == code


def figures(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        bench.main(["figures", *arguments])
    assert end.value.code == code


def test_without_matplotlib_the_record_is_there_and_drawn_later(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        for name in ("matplotlib", "matplotlib.axes"):
            patch.setitem(sys.modules, name, None)
        patch.delitem(sys.modules, "lba_exp.bench.model_figure", raising=False)
        patch.delattr("lba_exp.bench.model_figure", raising=False)
        measure("out")
        streams = capsys.readouterr()
        assert "matplotlib, which draws the figures, is not installed" in streams.err and "lba-bench figures out draws them" in streams.err
        assert {p.name for p in (tmp_path / "out").iterdir()} == {
            "result.json",
            "table.md",
            "table.csv",
        } and "written to out" in streams.out
        figures("out", code=1)
        assert capsys.readouterr().err.startswith("lba-bench: matplotlib, which draws the figures, is not installed")
    figures("out")
    names = ["memory_length.png", "time_length.png", "forms.png"]
    assert capsys.readouterr().out.split() == [f"out/{name}" for name in names]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "new has no result.json: give the folder that a benchmark wrote."),
        ("nonsense", "new/result.json is not a run's record"),
        ('{"status": "finished"}', "new has a record of the kind None: of operator benchmark and model benchmark figures are drawn."),
        ('{"status": "finished", "kind": "model benchmark"}', "new/result.json is not a benchmark's whole record: KeyError('settings')."),
        ('{"status": "finished", "kind": "operator benchmark"}', "new/result.json is not a benchmark's whole record: KeyError('cells')."),
    ],
)
def test_records_that_are_none(tmp_path, capsys, content, sentence):
    (tmp_path / "new").mkdir()
    if content is not None:
        (tmp_path / "new" / "result.json").write_text(content)
    figures("new", code=1)
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith(f"lba-bench: {sentence}") and streams.err.count("\n") == 1
