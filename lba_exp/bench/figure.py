"""The picture of a benchmark: time and peak memory against the length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lba_exp.bench.growth import groups, pass_name
from lba_exp.results.figures import FORM_COLOURS, INK, frame

SOFTMAX_STYLE = {"color": INK, "linestyle": (0, (4, 2))}


def draw(record: Mapping[str, Any]) -> Figure:
    """A column of panels per decay; a row per dtype and pass for the time, and below them one per dtype for the memory of its last pass.

    Args:
        record: a benchmark's record; cells that were not measured leave a gap.
    """
    grouped = groups(record["cells"])
    dtypes, decays, passes = ([*dict.fromkeys(key[i] for key in grouped)] for i in range(3))
    rows = [(dtype, part, "median_ms") for dtype in dtypes for part in passes] + [(dtype, passes[-1], "peak_bytes") for dtype in dtypes]
    figure = Figure(figsize=(3.9 * max(1, len(decays)), 3.1 * max(1, len(rows))), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    if not rows:
        figure.text(0.5, 0.45, "nothing was measured", ha="center", color=INK)
        return figure
    forms = list(dict.fromkeys(cell["form"] for cell in record["cells"]))
    lengths = sorted({cell["length"] for cell in record["cells"]})
    panels = figure.subplots(len(rows), len(decays), squeeze=False, sharex=True, sharey="row")
    for y, (dtype, part, figure_name) in enumerate(rows):
        for x, decay in enumerate(decays):
            axes = panels[y][x]
            _dress(axes, lengths)
            what = "time" if figure_name == "median_ms" else "memory"
            title = f"{what}, {'no decay' if decay == 'none' else decay}, {pass_name(part)}, {dtype}"
            axes.set_title(title, loc="left", fontsize=8.5, color=INK)
            for i, form in enumerate(forms):
                _line(axes, grouped.get((dtype, decay, part), []), form, i, figure_name)
        panels[y][0].set_ylabel("milliseconds" if figure_name == "median_ms" else "MiB beside the inputs", fontsize=8.5, color=INK)
    for axes in panels[-1]:
        axes.set_xlabel("tokens", fontsize=8.5, color=INK)
    handles = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles), fontsize=8.5, frameon=False, labelcolor=INK
        )
    return figure


def _line(axes: Axes, cells: list[Mapping[str, Any]], form: str, number: int, name: str) -> None:
    scale = 1.0 if name == "median_ms" else 2.0**-20
    # zero bytes beside the inputs have no place on a log axis
    points = [(c["length"], c[name] * scale) for c in cells if c["form"] == form and c["status"] == "measured" and c[name]]
    if points:
        style = SOFTMAX_STYLE if form == "softmax" else {"color": FORM_COLOURS.get(form, f"C{number}")}
        axes.plot(*zip(*points, strict=True), label=form, linewidth=1.6, marker="o", markersize=3, **style)


def _dress(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    frame(axes, 7.5)
    axes.tick_params(axis="x", labelrotation=45 if len(lengths) > 5 else 0)
