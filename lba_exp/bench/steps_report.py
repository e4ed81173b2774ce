"""The record of a benchmark of training steps as a table on the screen, table.md, table.csv and result.json."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lba_exp.bench import profile_report
from lba_exp.bench.report import head, markdown_table, milliseconds, print_table, ratio, spread, write_files
from lba_exp.results.folder import write_atomically
from lba_exp.results.screen import binary_size

COLUMNS = ("model", "form", "parameters", "step", "x first", "images/s", "peak memory", "x first's")

Record = Mapping[str, Any]


def write(record: Record, folder: Path) -> None:
    """Write every file of a benchmark into a folder that exists."""
    write_files(record, folder, markdown(record), comma_separated(record))
    if "profiles" in record:
        write_atomically(folder / "kernels.csv", profile_report.comma_separated(record))


def show(record: Record) -> None:
    """Print the tables, what their columns mean, and why models were not measured."""
    console = Console(width=10_000, highlight=False)  # rich would cut what is wider than the terminal
    for table in tables(record):
        print_table(console, *table)
    for line in notes(record):
        console.print(Text(line, style="dim"))
    for line in reasons(record):
        console.print(Text(line, style="yellow"))


def tables(record: Record) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]], int]]:
    """Title, columns, rows, and the number of columns that hold words: the models, then their profiles."""
    return [(title(record), COLUMNS, [row(cell) for cell in record["cells"]], 2), *profile_report.tables(record)]


def row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """A model's line of the table, as COLUMNS; one that was not measured says so in place of its time."""
    first = (cell["model"], cell["form"] or "", "" if cell["parameters"] is None else f"{cell['parameters']:,}")
    if cell["status"] != "measured":
        return (*first, cell["status"], *[""] * (len(COLUMNS) - len(first) - 1))
    return (
        *first,
        milliseconds(cell["median_ms"]),
        ratio(cell["over_first"]),
        f"{cell['images_per_second']:,.1f}",
        binary_size(cell["peak_bytes"]),
        ratio(cell["peak_over_first"]),
    )


def title(record: Record) -> str:
    """Sizes and settings in one line."""
    s = record["settings"]
    tokens = {f"{cell['tokens']:,}" for cell in record["cells"] if cell["tokens"]}
    compiled = {"model": "the model compiled", "graphs": "the model in CUDA graphs", "blocks": "its blocks compiled", "off": "not compiled"}
    precision = "bf16 autocast" if s["dtype"] == "bfloat16" else s["dtype"]
    counted = f" ({' or '.join(sorted(tokens))} tokens)" if tokens else ""
    overrides = f", {' '.join(s['overrides'])}" if s["overrides"] else ""
    return f"Training step, {s['resolution']} px{counted}, batch {s['batch']}, {precision}, {compiled[s['compile']]}{overrides}"


def notes(record: Record) -> list[str]:
    """What the columns mean."""
    settings, environment = record["settings"], record["environment"]
    load = f"load average {environment['load_average'][0]} before, {record['load_average_after']} after"
    memory = f"weights, optimizer state, batch, and what a step adds ({environment['memory_method']})"
    if settings["compile"] == "graphs":
        memory = "not told: CUDA graphs take their memory once, all models together; --compile model or blocks tells"
    return [
        f"step: forward pass, loss, backward pass, AdamW (one kernel), gradients set to none, on synthetic images of {settings['classes']} "
        f"classes; median of at least {settings['repeats']} steps, in turns with the other models, all of them warmed up before.",
        f"spread: {spread(record['cells'])}; {load}.",
        f"peak memory: {memory}.",
        *profile_report.notes(record),
    ]


def reasons(record: Record) -> list[str]:
    """Why models were not measured, or are not to be trusted."""
    told = [cell for cell in record["cells"] if cell["reason"]]
    unmeasured = [f"{cell['model']} {'' if cell['status'] == 'measured' else cell['status']}: {cell['reason']}" for cell in told]
    return unmeasured + profile_report.reasons(record)


def markdown(record: Record) -> str:
    """The whole benchmark as a Markdown page."""
    lines = head("Training step", record)
    for name, columns, rows, _ in tables(record):
        lines += [f"## {name}", "", *markdown_table(columns, rows), ""]
    for note in (*notes(record), *reasons(record)):
        lines += [note, ""]
    return "\n".join(lines)


def comma_separated(record: Record) -> str:
    """Every cell, one a line, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(record["cells"][0]) if record["cells"] else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(record["cells"])
    return text.getvalue()
