"""The picture of a run: learning curves, and how far the forms were apart while it trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

INK, FAINT, BATCH = "#24292f", "#d0d7de", "#bcc4cd"
TRAIN, VALIDATION, LIMIT = "#8c959f", "#0969da", "#cf222e"
FORM_COLOURS = {"recurrent": "#0969da", "chunkwise": "#bc4c00", "parallel": "#1a7f37", "fused": "#8250df", "blockwise": "#bf3989"}
EDGE = {"linestyle": "", "markersize": 4.5, "zorder": 4}

Points = list[tuple[float, float]]


def run_figure(rows: Iterable[Mapping[str, Any]], path: str | Path, title: str, parity_tolerance: float | None = None) -> Path:
    """Draw a run from the rows of its metrics.csv and write a PNG to ``path``, whose folder exists. Arguments as in ``draw_run``."""
    draw_run(rows, title, parity_tolerance).savefig(path, format="png")
    return Path(path)


def draw_run(rows: Iterable[Mapping[str, Any]], title: str, parity_tolerance: float | None = None) -> Figure:
    """Loss, accuracy and parity error over training, side by side.

    Args:
        rows: dicts with ``step`` and any of ``train/loss``, ``val/loss``, ``train/step_loss``, ``train/accuracy``, ``val/accuracy`` and
            ``parity/<form>/rel``, numbers or their text; what is missing, None or empty is left out, and so is a panel without numbers.
        title: a line above the panels.
        parity_tolerance: drawn as a line in the parity panel.
    """
    columns = _columns(rows)
    loss = {name: columns[name] for name in ("train/step_loss", "train/loss", "val/loss") if name in columns}
    accuracy = {name: columns[name] for name in ("train/accuracy", "val/accuracy") if name in columns}
    parity = {name.split("/")[1]: points for name, points in columns.items() if name.startswith("parity/") and name.endswith("/rel")}
    panels = [(draw, data) for draw, data in ((_loss, loss), (_accuracy, accuracy), (_parity, parity)) if data]

    figure = Figure(figsize=(4.4 * max(1, len(panels)), 3.6), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.03)
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=INK)
    for i, (draw, data) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        _dress(axes)
        if draw is _parity:
            draw(axes, data, parity_tolerance)
        else:
            draw(axes, data)
        steps = {step for points in data.values() for step, _ in points}
        if len(steps) == 1:
            axes.set_xticks([*steps])
    if not panels:
        figure.text(0.5, 0.45, "no measurements yet", ha="center", color=TRAIN)
    return figure


def _columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """name -> (step, value) in order of step; NaN is kept, what is no number is left out."""
    columns: dict[str, Points] = {}
    for row in rows:
        step = _number(row.get("step"))
        for name, value in row.items():
            value = _number(value)
            if step is not None and value is not None:
                columns.setdefault(name, []).append((step, value))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in columns.items()}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def frame(axes: Axes, size: float) -> None:
    """Two faint axes, ticks with numbers of ``size`` points, and faint lines across."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=size, length=3, color=FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)


def _dress(axes: Axes) -> None:
    frame(axes, 8)
    axes.set_xlabel("optimizer step", fontsize=8.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _name(axes: Axes, name: str) -> None:
    axes.set_title(name, loc="left", fontsize=9.5, color=INK)


def _line(axes: Axes, points: Points, label: str, **style: Any) -> None:
    """A line; with points marked while there are few enough to tell apart."""
    marker = "o" if len(points) <= 40 else ""
    axes.plot(*zip(*points, strict=True), label=label, **({"linewidth": 1.6, "marker": marker, "markersize": 3} | style))


def _legend(axes: Axes, **options: Any) -> None:
    legend = axes.legend(fontsize=8, frameon=False, labelcolor=INK, handlelength=1.6, borderaxespad=0.3, **options)
    legend.set_in_layout(False)  # it lies inside; counted, it can push the panels apart


def _loss(axes: Axes, columns: Mapping[str, Points]) -> None:
    _name(axes, "Loss")
    if "train/step_loss" in columns:
        label = "train" if "train/loss" not in columns else "train, one batch"
        _line(axes, columns["train/step_loss"], label, color=BATCH, linewidth=0.8, marker="")
    if "train/loss" in columns:
        _line(axes, columns["train/loss"], "train", color=TRAIN)
    if "val/loss" in columns:
        _line(axes, columns["val/loss"], "validation", color=VALIDATION)
    highest = max((value for points in columns.values() for _, value in points if math.isfinite(value)), default=1.0)
    axes.set_ylim(0, 1.06 * highest if highest > 0 else 1)
    _legend(axes)


def _accuracy(axes: Axes, columns: Mapping[str, Points]) -> None:
    _name(axes, "Accuracy")
    if "train/accuracy" in columns:
        _line(axes, columns["train/accuracy"], "train", color=TRAIN)
    if "val/accuracy" in columns:
        _line(axes, columns["val/accuracy"], "validation", color=VALIDATION)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    _legend(axes, loc="lower right")


def _parity(axes: Axes, forms: Mapping[str, Points], tolerance: float | None) -> None:
    """Relative errors on a log scale; exact zeros as hollow points at the lower edge, what is not finite as crosses at the upper one."""
    _name(axes, "Parity: error of each form's logits")
    positive = [value for points in forms.values() for _, value in points if 0 < value < math.inf]
    reach = [*positive, *([tolerance] if tolerance else [])] or [1e-7]
    bottom = 10 ** (math.floor(math.log10(min(*reach, 1e-7))) - 0.5)
    top = 10 ** (math.ceil(math.log10(max(*reach, 1e-4))) + 0.5)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_ylabel("relative L2 error, float32", fontsize=8.5, color=INK)
    axes.yaxis.set_minor_locator(NullLocator())
    known = [form for form in FORM_COLOURS if form in forms]
    for i, form in enumerate([*known, *(form for form in forms if form not in FORM_COLOURS)]):
        points, colour = forms[form], FORM_COLOURS.get(form, f"C{i}")
        if all(value == 0 for _, value in points):
            axes.plot([], [], label=f"{form}: exactly 0", color=colour, fillstyle="none", marker="o", **EDGE)
            continue  # the form that trains: nothing to see
        _line(axes, [(step, value if 0 < value < math.inf else math.nan) for step, value in points], form, color=colour)
        zeros, broken = [step for step, value in points if value == 0], [step for step, value in points if not math.isfinite(value)]
        if zeros:
            axes.plot(
                zeros, [bottom] * len(zeros), label=f"{form}: exactly 0", color=colour, fillstyle="none", marker="o", clip_on=False, **EDGE
            )
        if broken:
            axes.plot(broken, [top] * len(broken), label=f"{form}: not finite", color=colour, marker="x", clip_on=False, **EDGE)
    if tolerance:
        axes.axhline(tolerance, color=LIMIT, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"tolerance {tolerance:g}",
            (1, tolerance),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=LIMIT,
        ).set_in_layout(False)
    _legend(axes, loc="best")
