"""A table as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from lba_exp.results.collect import STATUSES
from lba_exp.results.layout import BEST, SECOND, Table, Text, lay_out
from lba_exp.results.tables import MEMORY, TIME, Grid

GREEK = "alpha beta gamma delta varepsilon zeta eta theta iota kappa lambda mu "
GREEK += "nu xi o pi rho varsigma sigma tau upsilon varphi chi psi omega"
LATEX = {
    **{chr(ord("α") + i): f"$\\{name}$" for i, name in enumerate(GREEK.split()) if name != "o"},
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "—": "---",
    "|": r"\textbar{}",
    "→": r"$\rightarrow$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def markdown(table: Table) -> str:
    """GitHub's Markdown, its columns lined up."""
    escaped = [[_markdown_cell(cell) for cell in row] for row in table.rows]
    head = [_markdown_text(name) for name in table.head]
    widths = [max(3, *(len(row[i]) for row in [head, *escaped])) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        pad = [cell.ljust(w) if i < table.labels else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(pad)} |"

    rule = ["-" * w if i < table.labels else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    notes = "".join(f"\n{_markdown_text(note)}\n" for note in table.notes)
    return f"{_markdown_text(table.title)}\n\n" + "\n".join([line(head), line(rule), *map(line, escaped)]) + "\n" + notes


def _markdown_text(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _markdown_cell(cell: Text) -> str:
    text = _markdown_text(cell.text)
    return {BEST: f"**{text}**", SECOND: f"<u>{text}</u>"}.get(cell.mark, text) + (f" {_markdown_text(cell.after)}" if cell.after else "")


def latex(table: Table) -> str:
    """A LaTeX table; needs the package booktabs."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex_text(table.title)}}}"]
    lines.append(rf"\begin{{tabular}}{{{'l' * table.labels}{'r' * (len(table.head) - table.labels)}}}")
    lines += [r"\toprule", _guarded(" & ".join(map(_latex_text, table.head))) + r" \\", r"\midrule"]
    lines += [_guarded(" & ".join(map(_latex_cell, row))) + r" \\" for row in table.rows]
    lines += [r"\bottomrule", r"\end{tabular}", *(rf"\par\small {_latex_text(note)}" for note in table.notes), r"\end{table}"]
    return "\n".join(lines) + "\n"


def _guarded(line: str) -> str:
    """A bracket or star that begins a line would be read as an argument of the command that ends the line before."""
    return f"{{}}{line}" if line.startswith(("[", "*")) else line


def _latex_text(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


def _latex_cell(cell: Text) -> str:
    text = _latex_text(cell.text)
    command = {BEST: r"\textbf", SECOND: r"\underline"}.get(cell.mark)
    return (f"{command}{{{text}}}" if command else text) + (f" {_latex_text(cell.after)}" if cell.after else "")


def grid_csv(grid: Grid) -> str:
    """One line per row, column and metric, numbers in full and unscaled (a share, not percent): for further work, not for reading.

    The paper's numbers are in ``unit_paper``; ratios are to the baseline; ``p_t`` and ``p_permutation`` are two-sided.
    """
    options, buffer = grid.options, io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    spreads = [] if options.spread == "none" else [options.spread]
    head = [*options.rows, *options.cols, "metric", "mean", *spreads, "n", "runs", *(s for s in STATUSES), "no_value"]
    head += ["paper", "unit_paper"] if options.paper is not None else []
    head += ["relative_time", "relative_memory"] if grid.baseline is not None and options.costs else []
    head += ["difference", "p_t", "p_permutation", "pairs"] if options.compare else []
    writer.writerow(head)
    for (row, col, metric), cell in grid.cells.items():
        line = [*row, *col, metric, cell.mean, *(cell.spread(kind) for kind in spreads), cell.n, len(cell.runs)]
        line += [sum(run.status == status for run in cell.runs) for status in STATUSES]
        line.append(cell.lacking["no value"])
        if options.paper is not None:
            line += options.paper.number(row, col) or (None, None) if metric == options.metrics[0] else (None, None)
        if grid.baseline is not None and options.costs:
            line += [grid.relative(row, col, TIME), grid.relative(row, col, MEMORY)]
        if options.compare:
            c = grid.comparison(row, col, metric)
            line += [None] * 4 if c is None else [c.difference, c.p_t, c.p_permutation, c.pairs]
        writer.writerow("" if value is None else value for value in line)
    return buffer.getvalue()


def table_csv(table: Table) -> str:
    """A table of text, line by line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.head)
    writer.writerows([cell.text for cell in row] for row in table.rows)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[Grid], str]] = {
    "md": lambda grid: markdown(lay_out(grid)),
    "csv": grid_csv,
    "tex": lambda grid: latex(lay_out(grid)),
}
