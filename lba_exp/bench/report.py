"""A benchmark's record as tables on the screen, table.md, table.csv and result.json."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lba_exp.bench import fla
from lba_exp.bench.growth import decay_name, groups, pass_name, sentence
from lba_exp.callbacks.memory import LIVE_TENSORS
from lba_exp.results.folder import write_atomically, write_record
from lba_exp.results.screen import binary_size, scientific

COLUMNS = ("length", "B", "B L", "form", "time", "host", "x copy", "softmax / form", "peak memory", "x (q, k, v, y)", "error")
CSV_COLUMNS = (
    *("dtype", "decay", "pass", "batch", "length", "form", "status", "reason", "median_ms", "quartile_1_ms", "quartile_3_ms", "calls"),
    *("host_ms", "softmax_over_form", "form_over_copy", "peak_bytes", "peak_over_io", "error", "denominator"),
)
HOST_BOUND = 0.9  # the host's time over the time of a call from which the call is bound by the host

Record = Mapping[str, Any]


def write_files(record: Record, folder: Path, page: str, table: str) -> None:
    """Write a record, its page and its table of plain values into a folder that exists."""
    write_record(folder, dict(record))
    write_atomically(folder / "table.md", page)
    write_atomically(folder / "table.csv", table)


def write_tables(record: Record, folder: Path) -> None:
    """Write the record and both tables: milliseconds, where the figure takes a second."""
    write_files(record, folder, markdown(record), comma_separated(record))


def show(record: Record) -> None:
    """Print one table per dtype, decay and pass, then what was not measured and the crossovers."""
    console = Console(width=10_000, highlight=False)  # rich would cut what is wider than the terminal
    for key, cells in groups(record["cells"]).items():
        console.print(Text(_title(record, key), style="bold"))
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
        for name in COLUMNS:
            table.add_column(name, justify="left" if name == "form" else "right", no_wrap=True)
        length = None
        for cell in cells:
            if length not in (None, cell["length"]):
                table.add_section()
            length = cell["length"]
            table.add_row(*(Text(text) for text in row(cell)))
        console.print(table)
        console.print()
    for line in notes(record):
        console.print(Text(line, style="dim"))
    for line in reasons(record):
        console.print(Text(line, style="yellow"))
    for entry in record["crossovers"]:
        console.print(Text(sentence(entry)))


def print_table(console: Console, name: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], words: int) -> None:
    """Print a table; ``words``: the first columns, which hold words."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < words else "right", no_wrap=True)
    for line in rows:
        table.add_row(*(Text(text) for text in line))
    console.print(Text(name, style="bold"))
    console.print(table)


def row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """A cell's line of the table, as COLUMNS; what was not measured says so in place of its time."""
    first = (f"{cell['length']:,}", f"{cell['batch']:,}", f"{cell['batch'] * cell['length']:,}", cell["form"])
    if cell["status"] != "measured":
        told = f"skipped: {cell['reason']}" if cell["status"] == "skipped" else cell["status"]
        return (*first, told, *[""] * (len(COLUMNS) - len(first) - 1))
    return (
        *first,
        milliseconds(cell["median_ms"]),
        "" if cell["host_ms"] is None else milliseconds(cell["host_ms"]) + " (bound)" * bound_by_host(cell),
        ratio(cell["form_over_copy"]),
        ratio(cell["softmax_over_form"]),
        binary_size(cell["peak_bytes"]),
        ratio(cell["peak_over_io"]),
        cell["reason"] or scientific(cell["error"]),
    )


def bound_by_host(cell: Mapping[str, Any]) -> bool:
    """Whether a cell's time is about what the host takes to issue the call."""
    return cell["host_ms"] is not None and cell["host_ms"] >= HOST_BOUND * cell["median_ms"]


def ratio(value: float | None) -> str:
    """Two decimals; nothing for None."""
    return "" if value is None else f"{value:.2f}"


def spread(cells: Iterable[Mapping[str, Any]]) -> str:
    """How far the quartiles of a cell's times lie apart: what tells a quiet machine from a busy one."""
    shares = sorted((c["quartile_3_ms"] - c["quartile_1_ms"]) / c["median_ms"] for c in cells if c["status"] == "measured")
    if not shares:
        return "nothing was measured"
    return (
        f"the quartiles of a cell lie {shares[len(shares) // 2]:.0%} of its median apart in the middle cell, {shares[-1]:.0%} in the worst"
    )


def reasons(record: Record) -> list[str]:
    """Why cells failed or are not available here, each reason once."""
    told = [cell for cell in record["cells"] if cell["status"] in ("failed", "not available here")]
    return list(dict.fromkeys(f"{cell['form']} {cell['status']}: {cell['reason']}" for cell in told))


def milliseconds(value: float) -> str:
    """About three digits."""
    return f"{value:,.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f} ms"


def notes(record: Record) -> list[str]:
    """What the columns mean."""
    method = record["environment"]["memory_method"]
    load = f"load average {record['environment']['load_average'][0]} before, {record['load_average_after']} after"
    unseen = ", scratch space inside a single kernel not seen" if method == LIVE_TENSORS else ""
    return [
        f"time: median of at least {record['settings']['repeats']} calls, in turns with the other forms and lengths; "
        "softmax / form: time of scaled_dot_product_attention (not causal) over the form's, same length, dtype and turns.",
        "copy: half of the bytes of q, k, v, y from one place to another on the device, which moves as many as to read q, k, v and to "
        "write y once: the floor of the forward pass; x copy: time over it, of forward + backward too. Caches are not emptied between "
        "calls: small sizes stay in them, for the copy and the forms alike.",
        _host_note(record["cells"]),
        *_fla_notes(record["cells"]),
        f"spread: {spread(record['cells'])}; {load}.",
        f"peak memory: beside the inputs, output and gradients included ({method}{unseen}); x (q, k, v, y): as a multiple of these four.",
        f"error: relative L2 against direct summation in float64 over up to {record['judged_rows']} rows (sequence, token) at every head, "
        "softmax against softmax in float64.",
    ]


def _host_note(cells: Iterable[Mapping[str, Any]]) -> str:
    """What the column of the host's times tells."""
    told = [cell for cell in cells if cell["host_ms"] is not None]
    bound = f"; here {sum(map(bound_by_host, told))} of {len(told)} cells" if told else ""
    return (
        "host: the host's time to issue a call while the device has other work, so that it waits for nothing (GPU alone; empty where the "
        f"call itself waits); bound: it is at least {HOST_BOUND:.0%} of the time, which then is the host's: kernels shorter than their "
        f"launches{bound}."
    )


def _fla_notes(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """What ``lba_exp.bench.fla`` measures, in short, where it was asked to."""
    theirs = [cell for cell in cells if cell["form"] in fla.NAMES]
    ways = Counter(cell["denominator"] for cell in theirs if cell["denominator"])
    how = ", ".join(f"{way} ({number} of {ways.total()} cells)" for way, number in ways.items())
    divided = f"divided by the denominator that was quickest to find in the forward pass: {how}" if ways else "undivided"
    text = (
        "flash-linear-attention's chunk_simple_gla: fla is one causal pass, undivided, and judged as such; fla-x2 takes another one over "
        f"the flipped tokens, adds the two and takes the diagonal out once, {divided}. It has no gradient of a fixed decay."
    )
    return [text] if theirs else []


def markdown(record: Record) -> str:
    """The whole benchmark as a Markdown page."""
    lines = head("Operator benchmark", record)
    for note in (*notes(record), *reasons(record)):
        lines += [note, ""]
    for key, cells in groups(record["cells"]).items():
        lines += [f"## {_title(record, key)}", "", *markdown_table(COLUMNS, [row(cell) for cell in cells]), ""]
    if record["crossovers"]:
        lines += ["## Crossovers", "", *(f"- {sentence(entry)}" for entry in record["crossovers"]), ""]
    if record["growth"]:
        constant = f", B L about {record['settings']['tokens']:,}" if record["settings"]["tokens"] else ""
        lines += [f"## Growth: time at a length over time at the one before{constant}", "", *_growth_table(record["growth"]), ""]
    return "\n".join(lines)


def head(title: str, record: Record) -> list[str]:
    """The first lines of a benchmark's Markdown page: its command, commit and machine."""
    git, environment = record["git"], record["environment"]
    dirty = ", with uncommitted changes" if git["dirty"] else ""
    machine = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in environment.items() if value is not None)
    return [
        f"# {title}",
        "",
        f"`{record['command']}`",
        "",
        f"{record['began']}, commit {git['commit'] or 'unknown'}{dirty}, {record['status']}. {machine}.",
        "",
    ]


def _growth_table(growth: list[Record]) -> list[str]:
    """A line per form, a column per step from one length to the next."""
    steps = sorted({(g["from"], g["to"]) for g in growth})
    lines: dict[tuple[str, ...], dict[tuple[int, int], str]] = {}
    for g in growth:
        key = (g["dtype"], decay_name(g["decay"]), pass_name(g["pass"]), g["form"])
        lines.setdefault(key, {})[g["from"], g["to"]] = f"{g['time_ratio']:.2f}"
    columns = ("dtype", "decay", "pass", "form", *(f"{left:,} to {right:,}" for left, right in steps))
    return markdown_table(columns, [(*key, *(ratios.get(step, "") for step in steps)) for key, ratios in lines.items()])


def comma_separated(record: Record) -> str:
    """Every cell, one a line, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="raise", lineterminator="\n")
    writer.writeheader()
    writer.writerows(record["cells"])
    return text.getvalue()


def markdown_table(columns: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *body]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _title(record: Record, key: tuple[str, str, str]) -> str:
    dtype, decay, part = key
    s = record["settings"]
    batch = f"B L about {s['tokens']:,}" if s["tokens"] else f"B = {s['batch']}"
    options = ("" if s["scaled"] else ", unscaled") + ("" if s["direction"] == "both" else f", {s['direction']} direction only")
    sizes = f"{batch}, H = {s['heads']}, Dk = {s['key_width']}, Dv = {s['value_width']}"
    return f"{decay_name(decay)}, {dtype}, {pass_name(part)}{options} ({sizes})"
