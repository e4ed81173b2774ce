"""The items of the paper's index: which runs make a table, and the table out of the records that are committed beside it.

``experiments/results/items.yaml`` says of each item what it is, which sweep runs it and which rows it has. The records lie beside it, one
JSON file a run, ``experiments/results/SWEEP/ROW-seedN.json``: items whose rows come from one sweep share them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from lba_exp.errors import UserError
from lba_exp.messages import unknown
from lba_exp.results.collect import ALIASES, FAILED, FINISHED, MISSING, Run
from lba_exp.results.layout import Table, Text, lay_out
from lba_exp.results.paper import PaperTable
from lba_exp.results.quantities import is_share, lower_is_better, style
from lba_exp.results.rendering import markdown
from lba_exp.results.tables import Cell, Grid, TableOptions, pivot

FILE = "items.yaml"
NOT_RUN = "not yet run"
SEEDS = (0, 1, 2)  # of a row of which there is no record


@dataclass(frozen=True)
class Item:
    """One table or figure.

    Attributes:
        name: its name.
        paper: what of the paper it is; of a twin, what of the paper it stands for.
        sweep: the sweep that runs it; None: another command measures it, or nothing does.
        command: that command.
        runs: overrides of each ``lba-train -m sweeps=SWEEP``; ``@NAME`` in one stands for the folder of ``lba-data prepare NAME``.
        needs: keys that have to be given, because no file can know them (``init_from``).
        rows: row -> the paper's number in percent, or column -> number; None: the paper has none.
        row_key, cols: keys that make the rows and the columns, as ``lba-table`` takes them.
        metric: the metric of the table.
        baseline: the row that the others are compared with, paired by seed.
        search: key -> further values, tried with seed 0; each row is shown with the value that is best in validation there.
        data, cost, expect, result, verdict: for the index, in words: the data, what it costs, what it should show, where the results of a
            command are, what came of it.
        like: the item whose rows, metric and baseline it has, on other data: it is its twin.
        twin: the item that is this one's twin.
    """

    name: str
    paper: str
    sweep: str | None = None
    command: str | None = None
    runs: Sequence[Sequence[str]] = ((),)
    needs: Sequence[str] = ()
    rows: Mapping[str, Any] = field(default_factory=dict)
    row_key: str = "row"
    cols: str = "data"
    metric: str = "test/accuracy"
    baseline: str | None = None
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    data: str = ""
    cost: str = ""
    expect: str = ""
    result: str = ""
    verdict: str = NOT_RUN
    like: str | None = None
    twin: str | None = None

    @property
    def search_key(self) -> str | None:
        return next(iter(self.search), None)

    def published(self) -> PaperTable | None:
        """The paper's numbers as ``lba-table`` puts them beside ours; None where there are none."""
        values = {}
        for row, number in self.rows.items():
            columns = number if isinstance(number, Mapping) else {"paper": number}
            values |= {(row, column): value for column, value in columns.items() if value is not None}
        units = {column: "percent" for _, column in values}
        single = "paper" if "paper" in units else None
        return PaperTable(self.name, self.paper, units, values, single) if values and is_share(self.metric) else None


def read_items(folder: Path) -> dict[str, Item]:
    """The items of ``folder`` (``experiments/results``).

    Raises:
        UserError: there is no such file, or it does not say what an item needs.
    """
    path = folder / FILE
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError:
        raise UserError(f"{path} cannot be read: start this in a checkout, or in a folder that holds experiments/results.") from None
    known, items = {f.name for f in fields(Item)}, {}
    for name, entry in content.items():
        if wrong := next((key for key in entry if key not in known), None):
            raise UserError(f"{path}, {name}: {unknown(wrong, sorted(known), 'a key of an item')}")
        like = content.get(entry.get("like"), {})
        shared = {key: like[key] for key in ("paper", "rows", "row_key", "metric", "baseline", "expect") if key in like}
        items[name] = Item(name, **{**shared, **entry})
        if items[name].sweep and items[name].command:
            raise UserError(f"{path}, {name}: give a sweep or a command, not both.")
    return items


def find(items: Mapping[str, Item], name: str) -> Item:
    """The item of that name; raises UserError with the valid ones."""
    if name not in items:
        raise UserError(unknown(name, items, "an item"))
    return items[name]


def read_records(item: Item, folder: Path) -> list[Run]:
    """The committed runs of an item, in order of their files.

    Raises:
        UserError: a file is no record.
    """
    found = []
    for path in sorted((folder / str(item.sweep)).glob("*.json")) if item.sweep else []:
        try:
            content = json.loads(path.read_text("utf-8"))
            run = Run(path.stem, content["result"], content["config"], content["result"]["status"], content["result"].get("error"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not a run's record, as lba-item collect writes them.") from None
        if run.label(item.row_key) in item.rows:
            found.append(run)
    return found


def choose(item: Item, runs: Sequence[Run]) -> list[Run]:
    """The runs with the value of ``item.search`` that is best in validation for their row, on the seeds that all its values have.

    Raises:
        UserError: the values of a row have no seed in common.
    """
    key = item.search_key
    if key is None:
        return list(runs)
    kept = []
    for place in dict.fromkeys((run.label(item.row_key), run.label(item.cols)) for run in runs):
        by_value: dict[str, list[Run]] = {}
        for run in runs:
            if (run.label(item.row_key), run.label(item.cols)) == place:
                by_value.setdefault(run.label(key), []).append(run)
        seeds = set.intersection(*({run.label("seed") for run in found} for found in by_value.values()))
        if not seeds:
            raise UserError(f"{item.name}: the runs of {place[0]} with {key}={', '.join(by_value)} have no seed in common to choose by.")
        kept += by_value[max(by_value, key=lambda value: _score(item, by_value[value], seeds))]
    return kept


def _score(item: Item, runs: Sequence[Run], seeds: set[str]) -> float:
    metric = item.metric.replace("test/", "validation/")
    values = [run.numbers.get(metric) if run.status == FINISHED else None for run in runs if run.label("seed") in seeds]
    if any(value is None for value in values):
        return -float("inf")
    return statistics.fmean(values) * (-1 if lower_is_better(metric) else 1)


def item_grid(item: Item, runs: Sequence[Run]) -> Grid:
    """The numbers of an item's table; rows in the item's order, those without a run counted as missing."""
    runs = choose(item, runs)
    there = {run.label(item.row_key) for run in runs}
    row_key, column = ALIASES.get(item.row_key, item.row_key), {ALIASES.get(item.cols, item.cols): runs[0].label(item.cols)}
    for row in item.rows:
        if row not in there:
            runs += [Run("", {row_key: row, "seed": seed, **column}, status=MISSING) for seed in SEEDS]
    rows = (item.row_key, item.search_key) if item.search_key else (item.row_key,)
    finished = any(run.status == FINISHED for run in runs)
    metrics = (item.metric, "parameters") if finished else (item.metric,)
    baseline = item.baseline if item.baseline in there and len(item.rows) > 1 else None
    published = item.published()
    options = TableOptions(rows, (item.cols,), metrics, baseline=baseline, compare=baseline is not None, costs=False)
    grid = pivot(runs, options)
    if published is not None and any(published.number(row, col) for row in grid.rows for col in grid.cols):
        grid = pivot(runs, TableOptions(**{**options.__dict__, "paper": published}))
    order = list(item.rows)
    grid.rows.sort(key=lambda labels: order.index(labels[0]))
    return grid


def item_table(item: Item, runs: Sequence[Run]) -> str:
    """An item's table as Markdown, with what it is, and when and where its runs were made; a sentence where there is none."""
    what = f"{item.paper}, its twin on other data" if item.like else item.paper
    if item.sweep is None:
        how = f"measured by: {item.command}. {item.result or 'Not yet measured.'}" if item.command else f"{item.verdict}."
        return f"{item.name}: {what}. No table of runs; {how}\n"
    if not runs:
        return f"{item.name}: {what}. {NOT_RUN.capitalize()}: there is no record; lba-item reproduce {item.name} runs it.\n"
    table = _about_the_metric(lay_out(item_grid(item, runs)))
    table.notes.append(made(runs))
    return f"{item.name}: {what}. {item.expect}\n\n{markdown(table)}\nVerdict: {judged(item)}.\n"


def _about_the_metric(table: Table) -> Table:
    """Numbers of parameters are there to be read: neither compared nor ranked."""
    kept = [i for i, name in enumerate(table.head) if not name.startswith("parameters: difference")]
    counts = {i for i in kept if table.head[i].endswith("parameters")}
    rows = [[Text(row[i].text) if i in counts else row[i] for i in kept] for row in table.rows]
    return Table(table.title, [table.head[i] for i in kept], rows, table.labels, table.notes)


def judged(item: Item) -> str:
    """The verdict on an item that has runs."""
    return "none yet" if item.verdict == NOT_RUN else item.verdict


def made(runs: Sequence[Run]) -> str:
    """When, with which code and where runs were made."""
    begun = sorted({str(run.record.get("began", ""))[:10] for run in runs} - {""})
    commits = sorted({str(run.flat.get("git.commit"))[:7] + ("+" if run.flat.get("git.dirty") else "") for run in runs} - {"None", "None+"})
    machines = sorted({f"{run.flat.get('environment.device')}, torch {run.flat.get('environment.torch')}" for run in runs})
    when = " to ".join(dict.fromkeys((begun[0], begun[-1]))) if begun else "no date"
    changed = " (+: with uncommitted changes)" if any("+" in commit for commit in commits) else ""
    return f"Made {when}, commit {', '.join(commits) or 'unknown'}{changed}, {'; '.join(machines)}."


def in_short(item: Item, runs: Sequence[Run]) -> str:
    """An item's numbers in one line, for the index."""
    if not runs:
        return NOT_RUN
    grid = item_grid(item, runs)
    metric = grid.options.metrics[0]
    look = style(metric, [cell.mean for (_, _, m), cell in grid.cells.items() if m == metric and cell.n])
    parts = []
    for row in grid.rows:
        cells = [grid.cells[row, col, metric] for col in grid.cols]
        parts.append(f"{row[0]} {' / '.join(_short(cell, look) for cell in cells)}")
    counts = sorted({cell.n for (_, _, m), cell in grid.cells.items() if m == metric and cell.n})
    return f"{', '.join(parts)} (n = {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else 0}). {made(runs)}"


def _short(cell: Cell, look: Any) -> str:
    if not cell.n:
        return FAILED if cell.lacking[FAILED] else "—"
    around = cell.spread("std")
    return look.text(cell.mean) + ("" if around is None else f" ± {look.plain(around)}")
