"""Pictures of models in inference: the counterparts of figures 1, 3, 4, 9 (right) and 10 of arXiv 2502.16249."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from lba_exp.bench.model_report import form_name, model_name
from lba_exp.bench.pace import OVER
from lba_exp.results.figures import FORM_COLOURS, INK, frame
from lba_exp.results.naming import ONLY

COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#57606a")
STROKES = ("-", (0, (1, 1)), (0, (5, 1, 1, 1)))
MARKERS = {"parallel": "s", "recurrent": "o", "chunkwise": "^", "fused": "D"}
TIME, MEMORY = "median_ms", "peak_bytes"
NAMES = {TIME: ("time", "Time"), MEMORY: ("memory", "Peak memory")}

Cell = Mapping[str, Any]
Record = Mapping[str, Any]


def figures(record: Record) -> dict[str, Figure]:
    """Name -> figure, those that the cells are enough for.

    ``memory_length`` or ``memory_resolution``, and ``time_...`` alike: two or more sizes. ``forms``: memory against time, two or more
    forms. In its place ``chunk_size``: two or more chunks, at the largest size where all were measured.
    """
    axis = record["settings"]["axis"]
    cells = [c for c in record["cells"] if c["status"] in ("measured", "out of memory", OVER)]
    measured = [c for c in cells if c["status"] != "out of memory"]
    found = {}
    if len({c[axis] for c in measured}) > 1:
        for what in (MEMORY, TIME):
            if any(_value(c, what) for c in measured):
                found[f"{NAMES[what][0]}_{axis}"] = _by_size(record, cells, what)
    with_both = [c for c in measured if c[MEMORY]]
    chunks = {c["chunk_size"] for c in measured if c["chunk_size"]}
    if len({c["form"] for c in with_both if c["form"]}) > 1 and len(chunks) < 2:
        found["forms"] = _forms(record, with_both)
    if len(chunks) > 1:
        found["chunk_size"] = _chunks(record, measured)
    return found


def _by_size(record: Record, cells: list[Cell], what: str) -> Figure:
    """A line for each model and form; a cross at the upper edge where there was no memory."""
    axis = record["settings"]["axis"]
    figure, (axes,) = _page(record, 1)
    _log(axes, "x", axis if axis == "resolution" else "tokens", [c[axis] for c in cells])
    axes.set_yscale("log")
    scale, unit = _unit(cells, what)
    axes.set_ylabel(unit, fontsize=8.5, color=INK)
    axes.set_title(f"{NAMES[what][1]} of a forward pass", loc="left", fontsize=9.5, color=INK)
    missing: dict[int, int] = {}
    for name, style, own in _lines(cells):
        points = [(c[axis], _value(c, what) / scale) for c in own if _value(c, what)]
        lost = [c[axis] for c in own if c["status"] == "out of memory"]
        axes.plot(*zip(*points, strict=True) if points else ([], []), label=name, **style)
        if what == TIME:
            _hollow(axes, [(c[axis], c["estimated_ms"]) for c in own if c["estimated_ms"]], style)
        for size in lost:  # side by side where several lie on one size
            missing[size] = missing.get(size, 0) + 1
            axes.annotate(
                "×",
                (size, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-7 * (missing[size] - 1), 1),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=11,
                color=style["color"],
            )
    if missing:
        axes.plot([], [], linestyle="", marker="x", color=INK, markersize=5, label="out of memory")
    if what == TIME:
        _explain_hollow(axes, cells)
    _plain_numbers(axes, "y")
    _legend(figure, axes)
    return figure


def _forms(record: Record, cells: list[Cell]) -> Figure:
    """Memory against time, a line for each model and form through its sizes."""
    axis = record["settings"]["axis"]
    figure, (axes,) = _page(record, 1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("milliseconds", fontsize=8.5, color=INK)
    scale, unit = _unit(cells, MEMORY)
    axes.set_ylabel(unit, fontsize=8.5, color=INK)
    ends = "pixels" if axis == "resolution" else "tokens"
    axes.set_title(f"Memory and time of a forward pass, {ends} at the ends of a line", loc="left", fontsize=9.5, color=INK)
    for name, style, own in _lines(cells):
        axes.plot([_value(c, TIME) for c in own], [c[MEMORY] / scale for c in own], label=name, **style)
        _hollow(axes, [(c["estimated_ms"], c[MEMORY] / scale) for c in own if c["estimated_ms"]], style)
        for c, drop in ((own[0], -9), (own[-1], 5)) if len(own) > 1 else ():
            place = {"xytext": (0, drop), "textcoords": "offset points", "ha": "center", "fontsize": 6.5, "color": style["color"]}
            axes.annotate(f"{c[axis]:,}", (_value(c, TIME), c[MEMORY] / scale), **place)
    axes.margins(x=0.12, y=0.08)
    _explain_hollow(axes, cells)
    _plain_numbers(axes, "x")
    _plain_numbers(axes, "y")
    _legend(figure, axes)
    return figure


def _chunks(record: Record, cells: list[Cell]) -> Figure:
    """Memory and time of the chunkwise form against the tokens of a chunk; the other forms as lines across."""
    axis = record["settings"]["axis"]
    chunked = [c for c in cells if c["chunk_size"]]
    widest = max(len({c["chunk_size"] for c in chunked if c[axis] == size}) for size in {c[axis] for c in chunked})
    size = max(n for n in {c[axis] for c in chunked} if len({c["chunk_size"] for c in chunked if c[axis] == n}) == widest)
    cells = [c for c in cells if c[axis] == size]
    figure, panels = _page(record, 2)
    for axes, what in zip(panels, (MEMORY, TIME), strict=True):
        scale, unit = _unit(cells, what)
        _log(axes, "x", "tokens a chunk", [c["chunk_size"] for c in chunked])
        axes.set_ylabel(unit, fontsize=8.5, color=INK)
        head = f"{NAMES[what][1]} at {size:,} {'px' if axis == 'resolution' else 'tokens'}"
        axes.set_title(head, loc="left", fontsize=9.5, color=INK)
        for name, style, own in _lines(cells, chunks=False):
            points = [(c["chunk_size"], _value(c, what) / scale) for c in own if _value(c, what)]
            if points and points[0][0]:
                axes.plot(*zip(*sorted(points), strict=True), label=name, **style)
            elif points:
                line = {"linestyle": (0, (4, 2)), "linewidth": 1.2, "color": style["color"]}
                axes.axhline(points[0][1], label=name, **line)
        axes.set_ylim(bottom=0)
        _plain_numbers(axes, "y")
    _legend(figure, panels[0])
    return figure


def _value(cell: Cell, what: str) -> float | None:
    """A cell's memory; its time, an estimated one where it was over the limit."""
    return cell["estimated_ms"] if what == TIME and cell["status"] == OVER else cell[what]


def _hollow(axes: Axes, points: list[tuple[float, float]], style: Mapping[str, Any]) -> None:
    """Marks estimated times."""
    if points:
        axes.plot(*zip(*points, strict=True), **style | {"linestyle": "", "markerfacecolor": "white", "zorder": 4})


def _explain_hollow(axes: Axes, cells: Iterable[Cell]) -> None:
    if any(c["status"] == OVER for c in cells):
        axes.plot([], [], linestyle="", marker="o", markersize=4, color=INK, markerfacecolor="white", label="time estimated, see table")


def _unit(cells: Iterable[Cell], what: str) -> tuple[float, str]:
    """What a figure is divided by, and its unit in words."""
    if what == TIME:
        return 1.0, "milliseconds"
    power, name = (30, "GiB") if max(c[MEMORY] or 0 for c in cells) >= 2**30 else (20, "MiB")
    return 2.0**power, f"{name}, weights and inputs included"


def _lines(cells: Iterable[Cell], chunks: bool = True) -> list[tuple[str, dict[str, Any], list[Cell]]]:
    """Label, style and cells of each model and form (and chunk, or all chunks as one line).

    A form has its colour where there is but one linear model. Where there are more, each line has one of its own; where these are not
    enough, forms have colours and models strokes.
    """
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for c in cells:
        grouped.setdefault((model_name(c), form_name(c) if chunks else c["form"] or ONLY), []).append(c)
    names = list(dict.fromkeys(model for model, form in grouped if form != ONLY))
    several_chunks = chunks and len({c["chunk_size"] for c in cells if c["chunk_size"]}) > 1
    by_form = not several_chunks and (len(names) == 1 or sum(form != ONLY for _, form in grouped) > len(COLOURS))
    found, colours = [], itertools.cycle(COLOURS)
    for (model, form), own in grouped.items():
        kind = own[0]["form"]
        style = {"linewidth": 1.6, "markersize": 4, "marker": MARKERS.get(kind, "o")}
        if kind is None:
            style |= {"color": INK, "linestyle": (0, (4, 2))}
        elif by_form:
            style |= {"color": FORM_COLOURS[kind], "linestyle": STROKES[names.index(model) % len(STROKES)]}
        else:
            style |= {"color": next(colours)}
        found.append((model if kind is None else f"{model}, {form if several_chunks else kind}", style, own))
    return found


def _page(record: Record, count: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, and below them the command that measured it, and where."""
    width = 5.4 * count + 1.8
    figure = Figure(figsize=(width, 4.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        frame(axes, 7.5)
    commit = (record["git"]["commit"] or "unknown")[:7]
    where = f"{record['environment']['device']}, {record['settings']['dtype']}, torch {record['environment']['torch']}, commit {commit}"
    lines = [*textwrap.wrap(record["command"], int(20 * width), break_on_hyphens=False), where]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=6, color=INK)
    return figure, panels


def _log(axes: Axes, which: str, label: str, ticks: Iterable[int]) -> None:
    ticks = sorted(set(ticks))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis=which, labelrotation=45 if len(ticks) > 7 else 0)
    axes.set_xlabel(label if label != "resolution" else "resolution, pixels", fontsize=8.5, color=INK)


def _plain_numbers(axes: Axes, which: str) -> None:
    own = axes.xaxis if which == "x" else axes.yaxis
    if own.get_scale() == "log":
        own.set_major_locator(LogLocator(subs=(1, 2, 5)))
    own.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    own.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7.5, frameon=False, labelcolor=INK, handlelength=2.2)
