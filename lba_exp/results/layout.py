"""A grid of cells -> a table of text, the same for every format."""

from __future__ import annotations

from dataclasses import dataclass, field

from lba_exp.results.collect import STATUSES
from lba_exp.results.paper import SOURCE
from lba_exp.results.quantities import Style, heading, is_ranked, lower_is_better, style
from lba_exp.results.statistics import SPREADS, Comparison
from lba_exp.results.tables import MEMORY, NO_VALUE, TIME, Cell, Grid, Labels

MISSING = "—"
BEST, SECOND = "best", "second"


@dataclass(frozen=True)
class Text:
    """What stands in one cell: a text, and whether it is the best or the second best of its column."""

    text: str
    mark: str | None = None
    after: str = ""  # stands behind and is not marked


@dataclass
class Table:
    """A table to be written out. ``labels``: how many columns name the row; the others are numbers."""

    title: str
    head: list[str]
    rows: list[list[Text]]
    labels: int
    notes: list[str] = field(default_factory=list)


def lay_out(grid: Grid) -> Table:
    """Writes means, spreads and what is missing; marks the best and the second best of each column of means."""
    options = grid.options
    styles = {m: style(m, [c.mean for (_, _, metric), c in grid.cells.items() if metric == m and c.n]) for m in options.metrics}
    counts = {cell.n for cell in grid.cells.values() if cell.n}
    columns = [_labels(grid, i) for i in range(len(options.rows))]
    for col in grid.cols:
        for metric in options.metrics:
            columns.append(_means(grid, col, metric, styles[metric], show_n=len(counts) > 1))
            if options.compare:
                columns.append(_comparisons(grid, col, metric, styles[metric]))
            if options.paper is not None and metric == options.metrics[0]:
                columns.append(_published(grid, col))
        if grid.baseline is not None and options.costs:
            columns += [_ratios(grid, col, TIME, "training time"), _ratios(grid, col, MEMORY, "training memory")]
    rows = [list(row) for row in zip(*(texts for _, texts in columns), strict=True)]
    marked = any(cell.mark for row in rows for cell in row)
    return Table(_title(grid, styles), [head for head, _ in columns], rows, len(options.rows), _notes(grid, counts, marked))


def _title(grid: Grid, styles: dict[str, Style]) -> str:
    options = grid.options
    what = ", ".join(heading(metric, styles[metric].unit if len(styles) == 1 else "") for metric in options.metrics)
    spreads = any(cell.n > 1 for cell in grid.cells.values())
    how = f"mean ± {SPREADS[options.spread]}" if options.spread != "none" and spreads else "mean"
    return f"{what}: {how}"


def _labels(grid: Grid, i: int) -> tuple[str, list[Text]]:
    return grid.options.rows[i], [Text(row[i]) for row in grid.rows]


def _column_name(grid: Grid, col: Labels, name: str | None) -> str:
    """The column's values, and what it shows; one of the two where the other is the same for all columns."""
    where = ", ".join(col)
    if name is None:
        return where
    return f"{where}: {name}" if len(grid.cols) > 1 else name


def _means(grid: Grid, col: Labels, metric: str, look: Style, show_n: bool) -> tuple[str, list[Text]]:
    cells = [grid.cells[row, col, metric] for row in grid.rows]
    marks = _marks(cells, metric, look, grid.options.better)
    name = None if len(grid.options.metrics) == 1 else heading(metric, look.unit)
    texts = [_mean(cell, look, grid.options.spread, mark, show_n) for cell, mark in zip(cells, marks, strict=True)]
    return _column_name(grid, col, name), texts


def _marks(cells: list[Cell], metric: str, look: Style, better: str | None) -> list[str | None]:
    """Best and second best as they read: ties are marked alike. A cell that lacks runs is not ranked: its mean is over the survivors."""
    lower = lower_is_better(metric) if better is None else better == "lower"
    ranked = {i: look.rounded(cell.mean) for i, cell in enumerate(cells) if cell.n and not cell.lacking}
    places = sorted(set(ranked.values()), reverse=not lower)
    if len(places) < 2 or better == "none" or (better is None and not is_ranked(metric)):
        return [None] * len(cells)
    names = {places[0]: BEST, places[1]: SECOND}
    return [names.get(ranked.get(i)) for i in range(len(cells))]


def _mean(cell: Cell, look: Style, kind: str, mark: str | None, show_n: bool) -> Text:
    if _nothing(cell):
        return Text(MISSING)
    lacking = [f"{why} {cell.lacking[why]} of {len(cell.runs)}" for why in (*STATUSES, NO_VALUE) if cell.lacking[why]]
    if not cell.n:
        return Text(", ".join(lacking))
    around = cell.spread(kind)
    fixed = look.decimals == 0 and around == 0  # a number of parameters
    text = look.text(cell.mean) + ("" if around is None or fixed else f" ± {look.plain(around)}")
    after = "; ".join([f"n = {cell.n}"] * show_n + lacking)
    return Text(text, mark, f"({after})" if after else "")


def _nothing(cell: Cell) -> bool:
    """No run, or runs that finished and have no such number: the state size of softmax attention."""
    return not cell.n and cell.lacking[NO_VALUE] == len(cell.runs)


def _ratios(grid: Grid, col: Labels, metric: str, name: str) -> tuple[str, list[Text]]:
    ratios = [grid.relative(row, col, metric) for row in grid.rows]
    return _column_name(grid, col, name), [Text(MISSING if ratio is None else f"×{ratio:.3g}") for ratio in ratios]


def _published(grid: Grid, col: Labels) -> tuple[str, list[Text]]:
    numbers = [grid.options.paper.number(row, col) for row in grid.rows]
    texts = [MISSING if n is None else f"{n[0]:.2f}" if n[1] == "percent" else f"×{n[0]:g}" for n in numbers]
    return _column_name(grid, col, "paper"), [Text(text) for text in texts]


def _comparisons(grid: Grid, col: Labels, metric: str, look: Style) -> tuple[str, list[Text]]:
    found = [grid.comparison(row, col, metric) for row in grid.rows]
    name = "difference (p of t-test, of sign flips)"
    if len(grid.options.metrics) > 1:
        name = f"{metric}: {name}"
    return _column_name(grid, col, name), [Text("baseline" if c is None else _comparison(c, look)) for c in found]


def _comparison(comparison: Comparison, look: Style) -> str:
    if comparison.difference is None:
        return MISSING
    sign = "+" if comparison.difference >= 0 else "−"
    tests = ", ".join(MISSING if p is None else f"{p:.2g}" for p in (comparison.p_t, comparison.p_permutation))
    pairs = f"{comparison.pairs} pair" + ("" if comparison.pairs == 1 else "s")
    return f"{sign}{look.plain(abs(comparison.difference))} ({tests}; {pairs})"


def _notes(grid: Grid, counts: set[int], marked: bool) -> list[str]:
    options, notes = grid.options, []
    if len(grid.cols) == 1 and len(options.metrics) > 1:
        notes.append(f"{', '.join(options.cols)}: {', '.join(grid.cols[0])}.")
    if len(counts) == 1:
        notes.append(f"n = {(n := counts.pop())} {'run' if n == 1 else 'runs'} in each cell.")
    cells = list(grid.cells.values())
    if any(_nothing(cell) for cell in cells):
        notes.append(f"{MISSING}: {'no run' if all(not cell.runs for cell in cells if _nothing(cell)) else 'no such number'}.")
    if any(cell.lacking and not _nothing(cell) for cell in cells):
        notes.append("Runs without a result are counted in words" + ("." if options.better == "none" else "; their cells are not ranked."))
    if marked:
        notes.append("Bold: the best of a column; underlined: the second.")
    if grid.baseline is not None and options.costs:
        notes.append(f"Training time (validation left out) and training memory are relative to {', '.join(grid.baseline)}.")
    if options.compare:
        least = min((c.pairs for row in grid.rows for col in grid.cols if (c := grid.comparison(row, col, options.metrics[0]))), default=0)
        weak = f" With {least} pairs the sign-flip p cannot fall below {2 / 2**least:.2g}: weak evidence." if 1 < least < 6 else ""
        notes.append(
            f"Difference from {', '.join(grid.baseline)}, paired by seed; two-sided p of the paired t-test and of the exact sign-flip "
            f"test, not corrected for the number of comparisons.{weak}"
        )
    if options.paper is not None:
        notes.append(f"Paper: {SOURCE}, {options.paper.about}{', in %' if 'percent' in options.paper.units.values() else ''}.")
    return notes + grid.remarks
