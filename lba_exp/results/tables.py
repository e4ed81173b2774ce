"""Runs -> a grid of cells: rows and columns by any key, means over the runs of each cell."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lba_exp.errors import UserError
from lba_exp.messages import unknown
from lba_exp.results.collect import ALIASES, FINISHED, Run, check_keys, metric_name
from lba_exp.results.naming import comparable
from lba_exp.results.paper import PaperTable
from lba_exp.results.quantities import is_share
from lba_exp.results.statistics import Comparison, compare_paired, spread

TIME, MEMORY = "efficiency/train_seconds", "efficiency/peak_memory_bytes"
NO_VALUE = "no value"  # a finished run without (finite) number for the metric
# Keys in which the runs of one cell may differ: they decide nothing, or it is what a mean is taken over.
POOLED = ("seed", "name", "threads", "parity", "trainer.enable_progress_bar", "trainer.enable_model_summary")

Labels = tuple[str, ...]


@dataclass(frozen=True)
class TableOptions:
    """What a table shows.

    Attributes:
        rows, cols: keys that make the rows and the columns, see ``Run.label``.
        metrics: names of metrics, see ``collect.metric_name``; each is a column of its own.
        spread: one of ``statistics.SPREADS``.
        better: ``lower``, ``higher`` or ``none`` (no marks); None: by the metric's name.
        baseline: the row that time and memory are relative to, by its label; None: no such columns.
        compare: test each row against the baseline, paired by seed.
        paper: the published numbers beside the first metric.
        costs: with a baseline, time and memory relative to it.
    """

    rows: tuple[str, ...] = ("model",)
    cols: tuple[str, ...] = ("data",)
    metrics: tuple[str, ...] = ("test/accuracy",)
    spread: str = "std"
    better: str | None = None
    baseline: str | None = None
    compare: bool = False
    paper: PaperTable | None = None
    costs: bool = True


@dataclass
class Cell:
    """The runs of one row and column, and their values of one metric.

    Attributes:
        runs: all of them, whatever their status.
        metric: its full name.
    """

    runs: list[Run]
    metric: str

    @cached_property
    def values(self) -> list[tuple[str, float]]:
        """(seed, value) of the finished runs that have one."""
        found = [(run.label("seed"), run.numbers.get(self.metric)) for run in self.runs if run.status == FINISHED]
        return [(seed, value) for seed, value in found if value is not None]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(value for _, value in self.values) if self.values else None

    def spread(self, kind: str) -> float | None:
        return spread([value for _, value in self.values], kind)

    @cached_property
    def lacking(self) -> Counter[str]:
        """Why runs are not in the mean: status, or ``no value``, -> how many."""
        why = Counter(run.status for run in self.runs if run.status != FINISHED)
        without = len(self.runs) - self.n - sum(why.values())
        return why + Counter({NO_VALUE: without})


@dataclass
class Grid:
    """A table's numbers, not yet written out.

    Attributes:
        options: with the metrics' full names.
        rows, cols: labels, in order.
        cells: (row, column, metric) -> cell; those without a run are there too.
        remarks: what a reader must know.
    """

    options: TableOptions
    rows: list[Labels]
    cols: list[Labels]
    cells: dict[tuple[Labels, Labels, str], Cell]
    baseline: Labels | None = None
    remarks: list[str] = field(default_factory=list)

    def relative(self, row: Labels, col: Labels, metric: str) -> float | None:
        """The mean of a cost over that of the baseline in the same column; None where one of them is missing."""
        runs, base = (self.cells[r, col, self.options.metrics[0]].runs for r in (row, self.baseline))
        cost, reference = Cell(runs, metric).mean, Cell(base, metric).mean
        return cost / reference if cost is not None and reference else None

    def comparison(self, row: Labels, col: Labels, metric: str) -> Comparison | None:
        """A row against the baseline, paired by seed; None for the baseline itself."""
        if row == self.baseline:
            return None
        return compare_paired(*(self._by_seed(self.cells[r, col, metric]) for r in (row, self.baseline)))

    @staticmethod
    def _by_seed(cell: Cell) -> Mapping[str, float]:
        twice = [seed for seed, count in Counter(seed for seed, _ in cell.values).items() if count > 1]
        if twice:
            raise UserError(
                f"--compare pairs runs by seed, and a cell holds several of seed {twice[0]}: tell them apart by --rows, or give --where."
            )
        return dict(cell.values)


def pivot(runs: Sequence[Run], options: TableOptions) -> Grid:
    """Sort runs into the cells of a table.

    Raises:
        UserError: an unknown key, metric or baseline, or a combination that says nothing.
    """
    check_keys(options.rows, runs, "--rows")
    check_keys(options.cols, runs, "--cols")
    both = [k for k in options.rows if ALIASES.get(k, k) in {ALIASES.get(k, k) for k in options.cols}]
    if both:
        raise UserError(f"--rows and --cols both name {both[0]}: a key makes rows or columns.")
    metrics = tuple(dict.fromkeys(metric_name(metric, runs) for metric in options.metrics))
    options = TableOptions(**{**options.__dict__, "metrics": metrics})
    grouped: dict[tuple[Labels, Labels], list[Run]] = {}
    for run in runs:
        place = tuple(tuple(run.label(key) for key in keys) for keys in (options.rows, options.cols))
        grouped.setdefault(place, []).append(run)
    rows, cols = (sorted({place[i] for place in grouped}, key=_order) for i in (0, 1))
    cells = {(r, c, m): Cell(grouped.get((r, c), []), m) for r in rows for c in cols for m in metrics}
    grid = Grid(options, rows, cols, cells)
    grid.baseline = _baseline(options, rows)
    _check_paper(grid)
    grid.remarks = _remarks(grid, grouped)
    return grid


def _order(labels: Labels) -> list[tuple]:
    """Numbers by size, before words."""
    keys = []
    for label in labels:
        try:
            number = float(label)
        except ValueError:
            number = math.nan
        keys.append((0, number, label) if math.isfinite(number) else (1, 0.0, label))
    return keys


def _baseline(options: TableOptions, rows: Sequence[Labels]) -> Labels | None:
    if options.baseline is None:
        if options.compare:
            raise UserError("--compare needs --baseline ROW: the row that every other is compared with.")
        return None
    named = {", ".join(row): row for row in rows}
    if options.baseline in named:
        return named[options.baseline]
    single = [row for row in rows if options.baseline in row]
    if len(single) == 1:
        return single[0]
    raise UserError(f"--baseline: {unknown(options.baseline, named, 'one row of this table')}")


def _check_paper(grid: Grid) -> None:
    paper, metric = grid.options.paper, grid.options.metrics[0]
    if paper is None:
        return
    found = [paper.number(row, col) for row in grid.rows for col in grid.cols]
    units = {number[1] for number in found if number is not None}
    if not units:
        raise UserError(
            f"--paper {paper.name} has no number for this table: its rows are {', '.join(paper.rows)}, its columns "
            f"{', '.join(paper.units)}; rows and columns are matched by name, and TABLE:COLUMN puts one column beside every one here."
        )
    if units == {"percent"} and not is_share(metric):
        raise UserError(f"--paper {paper.name} holds accuracies, and --metric is {metric}.")


def _remarks(grid: Grid, grouped: Mapping[tuple[Labels, Labels], list[Run]]) -> list[str]:
    """What would make a mean or a ratio say something else than it seems to."""
    remarks = []
    differing: dict[str, set[str]] = {}
    for runs in grouped.values():
        finished = [comparable(run.config) for run in runs if run.status == FINISHED and run.config]
        for key in dict.fromkeys(k for flat in finished for k in flat):
            values = {str(flat.get(key)) for flat in finished}
            if len(values) > 1 and not any(key == k or key.startswith(f"{k}.") for k in POOLED):
                differing.setdefault(key, set()).update(values)
    if differing:
        shown = "; ".join(f"{key} ({', '.join(sorted(values))})" for key, values in list(differing.items())[:4])
        more = f" and {len(differing) - 4} keys more" if len(differing) > 4 else ""
        remarks.append(f"Runs of one cell differ in {shown}{more}: tell them apart by --rows or --cols, or choose by --where.")
    cells = [cell for (_, _, metric), cell in grid.cells.items() if metric == grid.options.metrics[0]]
    if not differing and any(len({seed for seed, _ in cell.values}) < cell.n for cell in cells):
        remarks.append("Some cell holds several runs of one seed.")
    costs = {TIME, MEMORY} if grid.baseline and grid.options.costs else {TIME, MEMORY} & set(grid.options.metrics)
    if costs:
        finished = [run for runs in grouped.values() for run in runs if run.status == FINISHED]
        machines = sorted({_machine(run) for run in finished})
        if len(machines) > 1:
            remarks.append(f"Times and memory come from different machines or settings: {'; '.join(machines)}.")
    return remarks


def _machine(run: Run) -> str:
    flat = run.flat
    device, threads, precision = (flat.get(f"environment.{key}", "unknown") for key in ("device", "threads", "precision"))
    return f"{device}, {flat.get('environment.devices', 1)} device(s), {threads} threads, {precision}"
