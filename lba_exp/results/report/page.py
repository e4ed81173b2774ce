"""Puts a report together: everything from the runs' records, escaped by the template engine, in one file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from lba_exp.results import screen
from lba_exp.results.collect import FINISHED, MISSING, STATUSES, Run
from lba_exp.results.layout import Table, lay_out
from lba_exp.results.report import charts
from lba_exp.results.report.svg import swatch
from lba_exp.results.tables import Grid, Labels, TableOptions, pivot

COSTS = ("parameters", "state_size", "efficiency/train_seconds", "efficiency/tokens_per_second", "efficiency/peak_memory_bytes")
FILES = {"result.json": "record", "config.yaml": "config", "train.log": "log", "run.png": "picture"}


def report_page(runs: Sequence[Run], options: TableOptions, output: Path, title: str, remarks: Sequence[str] = ()) -> str:
    """The page as HTML: it fetches nothing, and links only to the run folders, by paths relative to ``output``.

    Args:
        runs: from ``collect``.
        options: of the main table; its rows are also the lines of the figures.
        output: where the page will lie.
        title: its heading.
        remarks: shown below the main table.

    Raises:
        UserError: as of ``pivot``.
    """
    grid = pivot(runs, options)
    grid.remarks += remarks
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.get_template("page.html")
    return template.render(
        title=title,
        style=Markup((Path(__file__).parent / "style.css").read_text("utf-8")),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        facts=_facts(runs),
        tables=[lay_out(grid), *(table for col in grid.cols for table in _costs(grid, col))],
        runs=[_run_line(run, grid.options.metrics[0], output) for run in runs],
        metric=grid.options.metrics[0],
        parts=_parts(grid),
    )


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    counts = Counter(run.status for run in runs)
    commits = {(str(run.flat.get("git.commit"))[:9], bool(run.flat.get("git.dirty"))) for run in runs if run.flat.get("git.commit")}
    devices = {str(run.flat["environment.device"]) for run in runs if run.flat.get("environment.device")}
    versions = {f"lba_exp {v}, torch {run.flat.get('environment.torch')}" for run in runs if (v := run.flat.get("environment.lba_exp"))}
    facts = [
        ("runs", ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])),
        ("machines", "; ".join(sorted(devices))),
        ("versions", "; ".join(sorted(versions))),
        ("commits", "; ".join(f"{commit}{' with uncommitted changes' if dirty else ''}" for commit, dirty in sorted(commits))),
    ]
    return [(name, text) for name, text in facts if text]


def _costs(grid: Grid, col: Labels) -> list[Table]:
    """What a model costs, and how exact its other forms are: one column a figure, over the finished runs of a column of the main table."""
    options = grid.options
    runs = [run for row in grid.rows for run in grid.cells[row, col, options.metrics[0]].runs if run.status == FINISHED]
    known = {key for run in runs for key, value in run.numbers.items() if value is not None}
    metrics = tuple(m for m in (*COSTS, "parity/recurrent/rel", "parity/chunkwise/rel") if m in known)
    if not metrics:
        return []
    table = lay_out(pivot(runs, TableOptions(options.rows, options.cols, metrics, options.spread, better="none")))
    table.title = f"{', '.join(col)}: size, training cost, and error of the other forms on the test split"
    return [table]


def _run_line(run: Run, metric: str, output: Path) -> dict[str, Any]:
    folder = Path(run.place)
    relative = _link(folder, output)
    links = [(f"{relative}/{file}", name) for file, name in FILES.items() if (folder / file).is_file()]
    if run.log is not None:
        links.append((_link(run.log, output), "log"))
    value, cost = run.numbers.get(metric), run.numbers.get("efficiency/train_seconds")
    parity = run.flat.get("parity.verdict")
    return {
        "labels": [run.label(key) for key in ("name", "model", "data", "seed")],
        "name": Markup(escape(run.label("name")).replace(",", Markup(",<wbr>"))),  # a long name breaks between its overrides
        "status": run.status,
        "error": run.error if run.status != MISSING else None,  # the status says it all
        "value": "" if value is None else screen.percent(value) if metric.endswith("accuracy") else f"{value:.4g}",
        "step": "" if run.numbers.get("best/step") is None else f"{run.numbers['best/step']:,}",
        "time": screen.seconds(cost) or "",
        "parity": parity if isinstance(parity, str) else "",
        "folder": f"{relative}/" if folder.is_dir() else "",
        "shown": str(folder),
        "links": links,
    }


def _link(path: Path, output: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), output.parent.resolve())).as_posix())


def _parts(grid: Grid) -> list[dict[str, Any]]:
    """The figures, one part for each column of the table."""
    parts = []
    for col in grid.cols:
        groups = {", ".join(row): grid.cells[row, col, grid.options.metrics[0]].runs for row in grid.rows}
        rows = {run.place: charts.rows_of(run) for runs in groups.values() for run in runs}
        metric = grid.options.metrics[0]
        time = [charts.curves_against_time(groups, rows, metric), charts.against_time(groups, metric)]
        parity = [f for label, runs in groups.items() if (f := charts.parity_over_training(label, runs, rows)) is not None]
        decays = [f for i, (label, runs) in enumerate(groups.items()) for f in charts.decay_figures(label, i, runs)]
        forms = sorted({form for figure in parity for form in figure.forms}, key=charts.form_index)
        parts.append(
            {
                "rows": [{"swatch": Markup(swatch(i)), "name": label} for i, (label, runs) in enumerate(groups.items()) if runs],
                "name": ", ".join(col),
                "curves": _drawn(charts.learning_curves(groups, rows)),
                "time": _drawn([figure for figure in time if figure is not None]),
                "parity": _drawn(parity),
                "decays": _drawn(decays),
                "forms": [{"swatch": Markup(swatch(charts.form_index(form))), "name": form} for form in forms],
            }
        )
    return parts


def _drawn(figures: Sequence[charts.Figure]) -> list[dict[str, Any]]:
    return [{"svg": Markup(figure.svg), "caption": figure.caption, "wide": figure.wide} for figure in figures]
