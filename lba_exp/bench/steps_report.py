"""The record of a benchmark of training steps as a table on the screen, table.md, table.csv and result.json."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lba_exp.bench.report import head, markdown_table, milliseconds, ratio, spread
from lba_exp.results.folder import write_atomically, write_record
from lba_exp.results.screen import binary_size

COLUMNS = ("model", "form", "parameters", "step", "x first", "images/s", "peak memory", "x first's")

Record = Mapping[str, Any]


def write(record: Record, folder: Path) -> None:
    """Write every file of a benchmark into a folder that exists."""
    write_record(folder, dict(record))
    write_atomically(folder / "table.md", markdown(record))
    write_atomically(folder / "table.csv", comma_separated(record))


def show(record: Record) -> None:
    """Print the table, what its columns mean, and why models were not measured."""
    console = Console(width=10_000, highlight=False)  # rich would cut what is wider than the terminal
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:2] else "right", no_wrap=True)
    for cell in record["cells"]:
        table.add_row(*(Text(text) for text in row(cell)))
    console.print(Text(title(record), style="bold"))
    console.print(table)
    for line in notes(record):
        console.print(Text(line, style="dim"))
    for line in reasons(record):
        console.print(Text(line, style="yellow"))


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
    compiled = {"model": "the model compiled", "blocks": "its blocks compiled", "off": "not compiled"}[s["compile"]]
    precision = "bf16 autocast" if s["dtype"] == "bfloat16" else s["dtype"]
    counted = f" ({' or '.join(sorted(tokens))} tokens)" if tokens else ""
    overrides = f", {' '.join(s['overrides'])}" if s["overrides"] else ""
    return f"Training step, {s['resolution']} px{counted}, batch {s['batch']}, {precision}, {compiled}{overrides}"


def notes(record: Record) -> list[str]:
    """What the columns mean."""
    settings, environment = record["settings"], record["environment"]
    load = f"load average {environment['load_average'][0]} before, {record['load_average_after']} after"
    return [
        f"step: forward pass, loss, backward pass, AdamW (one kernel), gradients set to none, on synthetic images of {settings['classes']} "
        f"classes; median of at least {settings['repeats']} steps, in turns with the other models, all of them warmed up before.",
        f"spread: {spread(record['cells'])}; {load}.",
        f"peak memory: weights, optimizer state, batch, and what a step adds ({environment['memory_method']}).",
    ]


def reasons(record: Record) -> list[str]:
    """Why models were not measured, or are not to be trusted."""
    told = [cell for cell in record["cells"] if cell["reason"]]
    return [f"{cell['model']} {'' if cell['status'] == 'measured' else cell['status']}: {cell['reason']}" for cell in told]


def markdown(record: Record) -> str:
    """The whole benchmark as a Markdown page."""
    lines = head("Training step", record)
    lines += [f"## {title(record)}", "", *markdown_table(COLUMNS, [row(cell) for cell in record["cells"]]), ""]
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
