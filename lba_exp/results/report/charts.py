"""The figures of a report: learning curves, accuracy against time, parity, decays."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lba_exp.results.collect import FINISHED, Run
from lba_exp.results.quantities import is_share, style
from lba_exp.results.report.svg import LEFT, RIGHT, WIDTH, Axis, Chart, Series
from lba_exp.results.rows import read_rows
from lba_exp.results.screen import seconds
from lba_exp.results.tables import TIME

MOST_POINTS = 300  # of one line
LONGEST_MEMORY, SHORTEST_MEMORY = 1e6, 0.1  # tokens; what lies beyond is drawn at the edge
FORMS = ("recurrent", "chunkwise", "parallel", "fused", "blockwise")

Groups = Mapping[str, Sequence[Run]]  # label of a row -> its runs


@dataclass
class Figure:
    """A chart and what is written below it."""

    svg: str
    caption: str
    wide: bool = False
    forms: tuple[str, ...] = ()


def rows_of(run: Run) -> list[dict]:
    """The rows of a run's metrics.csv; none where it cannot be read."""
    try:
        return read_rows(Path(run.place) / "metrics.csv")
    except (OSError, ValueError):
        return []


def _finished(runs: Sequence[Run]) -> list[Run]:
    """The runs that a line is drawn from: those that finished, or whatever there is where none did."""
    return [run for run in runs if run.status == FINISHED] or list(runs)


def _thin(points: list) -> list:
    """At most ``MOST_POINTS`` of them, evenly spaced, the last one always there."""
    if len(points) <= MOST_POINTS:
        return points
    step = (len(points) - 1) / (MOST_POINTS - 1)
    return [points[round(i * step)] for i in range(MOST_POINTS)]


def _share(value: float) -> str:
    return f"{100 * value:.4g}%"


def learning_curves(groups: Groups, rows: Mapping[str, list[dict]]) -> list[Figure]:
    """One chart for each metric of training and validation: the mean over a row's runs, and one standard deviation to both sides.

    Args:
        groups: label -> runs.
        rows: a run's place -> the rows of its metrics.csv.
    """
    figures = []
    for metric in _curve_names(rows):
        series = [s for i, (label, runs) in enumerate(groups.items()) if (s := _curve(label, i, runs, rows, metric)).points]
        if not series:
            continue
        y = Axis(metric.replace("val/", "validation ").replace("train/", "training ").replace("_", " "))
        if is_share(metric):
            y.write = _share
        edges = [v for s in series for _, low, high in s.band for v in (low, high)]
        y.fit([v for s in series for _, v in s.points] + edges)
        if is_share(metric):
            y.low, y.high = max(0.0, y.low), min(1.0, y.high)
        name = y.label
        figures.append(_steps(f"{name.capitalize()} over training", series, y, f"{name.capitalize()} after each validation."))
    return figures


def _curve_names(rows: Mapping[str, list[dict]]) -> list[str]:
    """Columns that are drawn: those of training and validation, losses first."""
    names = dict.fromkeys(key for table in rows.values() for row in table for key in row)
    chosen = [n for n in names if n.partition("/")[0] in ("train", "val") and n.count("/") == 1 and n != "train/step_loss"]
    return sorted(chosen, key=lambda n: (not n.endswith("loss"), n.startswith("val/"), n))


def _curve(label: str, index: int, runs: Sequence[Run], rows: Mapping[str, list[dict]], metric: str) -> Series:
    values: dict[float, list[float]] = {}
    for run in _finished(runs):
        for row in rows[run.place]:
            if math.isfinite(row.get(metric, math.nan)) and "step" in row:
                values.setdefault(row["step"], []).append(row[metric])
    points, band = [], []
    for step, found in sorted(values.items()):
        mean = statistics.fmean(found)
        points.append((step, mean))
        if len(found) > 1:
            deviation = statistics.stdev(found)
            band.append((step, mean - deviation, mean + deviation))
    return Series(label, _thin(points), _thin(band), index)


def _steps(title: str, series: list[Series], y: Axis, caption: str, limit: tuple[float, str] | None = None) -> Figure:
    """A chart over optimizer steps."""
    x = Axis("optimizer step", whole=True)
    x.fit([v for s in series for v in [p[0] for p in s.points] + s.zeros + s.broken])
    x.low = max(0.0, x.low)
    told = [f"{s.name} from {y.write(s.points[0][1])} to {y.write(s.points[-1][1])}" for s in series if s.points]
    chart = Chart(title, f"{caption} {'; '.join(told)}.", x, y)
    if limit is not None:
        chart.limit(*limit)
    for one in series:
        chart.line(one)
    return Figure(chart.done(), caption)


def against_time(groups: Groups, metric: str) -> Figure | None:
    """The final metric of each run against its training time: small points; and the mean of each row: large points."""
    found = {}
    for label, runs in groups.items():
        pairs = [(run, run.numbers.get(TIME), run.numbers.get(metric)) for run in runs if run.status == FINISHED]
        found[label] = [(run, t, v) for run, t, v in pairs if t and v is not None]
    values = [v for pairs in found.values() for _, _, v in pairs]
    times = [t for pairs in found.values() for _, t, _ in pairs]
    if not values:
        return None
    look = style(metric, values)
    y = Axis(metric.replace("/", " ").replace("_", " "), write=_share if is_share(metric) else look.text)
    y.fit(values)
    x, length = _time_axis(times)
    means = {label: tuple(statistics.fmean(p[i] for p in pairs) for i in (1, 2)) for label, pairs in found.items() if pairs}
    told = "; ".join(f"{label} {y.write(v)} after {seconds(t)}" for label, (t, v) in means.items())
    name = y.label.capitalize()
    caption = f"{name} of the best checkpoint against training time. Small: one run; large: the mean of a row."
    chart = Chart(f"{name} against training time", f"{caption} {told}.", x, y)
    for i, (label, pairs) in enumerate(found.items()):
        for run, time, value in pairs:
            hint = f"{label}, seed {run.label('seed')}: {y.write(value)} after {seconds(time)}"
            chart.marker(time / length, value, i, hint, hollow=True)
        if label in means:
            time, value = means[label]
            chart.marker(time / length, value, i, f"{label}, mean: {y.write(value)} after {seconds(time)}", 5)
    return Figure(chart.done(), caption)


def _time_axis(times: Sequence[float]) -> tuple[Axis, float]:
    """An axis of training time in a unit that fits, and the unit's length in seconds."""
    unit, length = next((u, s) for u, s in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if max(times) >= 2 * s or s == 1)
    x = Axis(f"training time in {unit}, validation left out", log=max(times) > 20 * min(times))
    x.low = None if x.log else 0.0
    x.fit([time / length for time in times])
    return x, length


def curves_against_time(groups: Groups, rows: Mapping[str, list[dict]], metric: str) -> Figure | None:
    """What ``metric`` is on the validation split, over the time trained so far: means of both over a row's runs, step by step."""
    split, _, name = metric.partition("/")
    column = f"val/{name}"
    series = []
    for i, (label, runs) in enumerate(groups.items() if split in ("test", "validation") else ()):
        timed = {run.place: [row for row in rows[run.place] if row.get(TIME, 0.0) > 0] for run in runs}
        values, times = (_curve(label, i, runs, timed, key) for key in (column, TIME))
        at = dict(times.points)
        band = [(at[step], low, high) for step, low, high in values.band if step in at]
        series.append(Series(label, [(at[step], value) for step, value in values.points if step in at], band, i))
    series = [one for one in series if one.points]
    if not series:
        return None
    x, length = _time_axis([time for one in series for time, _ in one.points])
    shown = [v for one in series for _, v in one.points] + [v for one in series for _, *ends in one.band for v in ends]
    y = Axis(f"validation {name}".replace("_", " "), write=_share if is_share(metric) else style(metric, shown).text)
    y.fit(shown)
    if is_share(metric):
        y.low, y.high = max(0.0, y.low), min(1.0, y.high)
    caption = f"{y.label.capitalize()} against training time, after each validation."
    told = "; ".join(f"{s.name} {y.write(s.points[-1][1])} after {seconds(s.points[-1][0])}" for s in series)
    chart = Chart(f"{y.label.capitalize()} against training time", f"{caption} {told}.", x, y)
    for one in series:
        scaled = [(time / length, value) for time, value in one.points]
        chart.line(replace(one, points=scaled, band=[(time / length, *ends) for time, *ends in one.band]))
    return Figure(chart.done(), caption)


def parity_over_training(label: str, runs: Sequence[Run], rows: Mapping[str, list[dict]]) -> Figure | None:
    """The error of each form against the form trained in, the largest over a row's runs, with the tolerance."""
    errors: dict[str, dict[float, float]] = {}
    for run in _finished(runs):
        for row in rows[run.place]:
            for key, value in row.items():
                if key.startswith("parity/") and key.endswith("/rel"):
                    seen = errors.setdefault(key.split("/")[1], {})
                    before = seen.get(row["step"], 0.0)
                    seen[row["step"]] = value if math.isnan(value) or math.isnan(before) else max(before, value)
                    if math.isnan(before):
                        seen[row["step"]] = before
    known = [form for form in FORMS if form in errors] + sorted(set(errors) - set(FORMS))
    series = []
    for form in known:
        points = sorted(errors[form].items())
        if all(value == 0 for _, value in points):
            continue  # the form that trains
        drawn = _thin([(s, v) for s, v in points if 0 < v < math.inf])
        zeros, broken = [s for s, v in points if v == 0], [s for s, v in points if not math.isfinite(v)]
        series.append(Series(form, drawn, index=form_index(form), zeros=zeros, broken=broken))
    if not series:
        return None
    tolerances = sorted({t for run in _finished(runs) if isinstance(t := run.flat.get("parity.tolerance"), int | float) and t > 0})
    y = Axis("relative L2 error of the logits", log=True, write=lambda value: f"{value:.1e}".replace(".0e", "e"))
    y.fit([v for s in series for _, v in s.points] + tolerances)
    y.low, y.high = y.low / 3, y.high * 3
    several = " (largest of the runs)" if len(_finished(runs)) > 1 else ""
    caption = f"{label}: error of each form in float32{several}, after each validation."
    limit = (tolerances[0], f"tolerance {tolerances[0]:g}") if tolerances else None
    return replace(_steps(f"Parity of {label} over training", series, y, caption, limit), forms=tuple(s.name for s in series))


def form_index(form: str) -> int:
    """A form's colour, apart from those of the first rows."""
    return FORMS.index(form) if form in FORMS else len(FORMS)


def decay_figures(label: str, index: int, runs: Sequence[Run]) -> list[Figure]:
    """Memory lengths -1 / log f of every layer and head: quantiles over tokens, a box for each run.

    One chart for the forward decays, and a second one for the backward decays where these are not the same gates.
    """
    figures = []
    for direction in ("forward", "backward"):
        boxes = {run.place: found for run in runs if (found := _memory(run, direction))}
        if direction == "backward" and not any(_differs(run) for run in runs):
            continue
        if boxes:
            drawn = [(run, boxes[run.place]) for run in runs if run.place in boxes]
            figures.append(_decays(label, index, direction if direction == "backward" else "", drawn))
    return figures


def _layers(run: Run) -> list[Mapping]:
    decays = run.record.get("decays")
    layers = decays.get("layers") if isinstance(decays, Mapping) else None
    return [layer for layer in layers if isinstance(layer, Mapping)] if isinstance(layers, list) else []


def _memory(run: Run, direction: str) -> list[list[list[float]]]:
    """[layer][head] -> five memory lengths in tokens, from short to long; an empty list for a layer without decay."""
    found = []
    for layer in _layers(run):
        heads = layer.get(direction) or []
        found.append([[min(LONGEST_MEMORY, max(SHORTEST_MEMORY, -1 / d)) if d < 0 else LONGEST_MEMORY for d in head] for head in heads])
    return found if any(found) else []


def _differs(run: Run) -> bool:
    """Whether the two directions have decays of their own: else they differ by the one token at the edge."""
    forward, backward = _memory(run, "forward"), _memory(run, "backward")
    pairs = [
        (a, b) for f, g in zip(forward, backward, strict=False) for h, k in zip(f, g, strict=False) for a, b in zip(h, k, strict=False)
    ]
    return bool(backward) and (not forward or any(abs(math.log(a / b)) > 0.3 for a, b in pairs))


def _decays(label: str, index: int, direction: str, boxes: Sequence[tuple[Run, list]]) -> Figure:
    heads = [max(len(found[i]) if i < len(found) else 0 for _, found in boxes) for i in range(max(len(found) for _, found in boxes))]
    slots = sum(heads)
    width = max(WIDTH, LEFT + RIGHT + slots * max(14, 6 * len(boxes) + 4))
    unit = (width - LEFT - RIGHT) / max(1, slots)
    thick = round(min(9.0, 0.7 * unit / len(boxes)), 2)
    starts = [sum(heads[:i]) for i in range(len(heads))]
    y = Axis("memory length, tokens", log=True, write=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
    y.fit([v for _, found in boxes for layer in found for head in layer for v in head])
    x = Axis("head", low=0, high=max(1, slots))
    ticks = [(starts[i] + h + 0.5, str(h + 1)) for i, n in enumerate(heads) for h in range(n)]
    medians = [statistics.fmean(found[i][h][2] for _, found in boxes if i < len(found) and h < len(found[i])) for i, h in _slots(heads)]
    told = "; ".join(f"layer {i + 1} head {h + 1}: {y.write(m)}" for (i, h), m in zip(_slots(heads), medians, strict=True))
    what = f"{label}{', ' + direction + ' decays' if direction else ''}"
    fixed = all(math.isclose(head[0], head[-1], rel_tol=1e-6) for _, found in boxes for layer in found for head in layer)
    if fixed:  # no box to be drawn
        caption = f"{what}: the same for every token; one point for each run."
    else:
        caption = f"{what}: 5% to 95% (line), 25% to 75% (box) and median over the tokens of a test batch; one box for each run."
    chart = Chart(f"Memory length of {what}", f"{caption} Mean of the medians: {told}.", x, y, width, ticks)
    for i, start in enumerate(starts):
        if heads[i]:
            chart.divider(start, f"layer {i + 1}")
    for r, (run, found) in enumerate(boxes):
        for i, layer in enumerate(found):
            for h, quantiles in enumerate(layer):
                place = starts[i] + h + 0.5 + (r - (len(boxes) - 1) / 2) * 0.75 / len(boxes)
                hint = f"{label}, seed {run.label('seed')}, layer {i + 1}, head {h + 1}: median {y.write(quantiles[2])} tokens"
                if fixed:
                    chart.marker(place, quantiles[2], index, hint, 4)
                else:
                    chart.box(place, quantiles, index, f"{hint}, 5% {y.write(quantiles[0])}, 95% {y.write(quantiles[4])}", thick)
    return Figure(chart.done(), caption, wide=width > WIDTH)


def _slots(heads: Sequence[int]) -> list[tuple[int, int]]:
    return [(i, h) for i, n in enumerate(heads) for h in range(n)]
