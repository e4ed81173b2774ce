"""The record of a benchmark of whole models as tables on the screen, table.md, table.csv and result.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lba_exp.bench.memory_fit import SHORTEST
from lba_exp.bench.model_counts import FORMULAS
from lba_exp.bench.model_settings import FORM_KEY
from lba_exp.bench.pace import OVER
from lba_exp.bench.report import head, markdown_table, milliseconds, print_table, ratio, spread, write_files
from lba_exp.bench.steps_report import comma_separated
from lba_exp.callbacks.memory import LIVE_TENSORS
from lba_exp.results.naming import ONLY
from lba_exp.results.screen import binary_size

COLUMNS = ("model", "form", "tokens", "B", "time", "a second", "peak memory", "pass alone", "FLOPs", "operator, by formula")
FIT_COLUMNS = ("model", "tokens", "bytes a token", "predicted", "x predicted", "R^2", "at 0 tokens", "state, numbers")

Record = Mapping[str, Any]
Cell = Mapping[str, Any]


def write_tables(record: Record, folder: Path) -> None:
    """Write the record and both tables."""
    write_files(record, folder, markdown(record), comma_separated(record))


def show(record: Record) -> None:
    """Print the cells, what their columns mean, why some hold nothing, and last the short tables."""
    console = Console(width=10_000, highlight=False)  # rich would cut what is wider than the terminal
    print_table(console, *cells_table(record))
    for line in notes(record):
        console.print(Text(line, style="dim"))
    for line in reasons(record):
        console.print(Text(line, style="yellow"))
    for table in short_tables(record):
        print_table(console, *table)


def cells_table(record: Record) -> tuple[str, tuple[str, ...], list[tuple[str, ...]], int]:
    """Title, columns, a row for each cell, and the number of columns that hold words."""
    size = record["settings"]["axis"]
    unit = " px" if size == "resolution" else ""
    columns = COLUMNS if size == "length" else (*COLUMNS[:2], size, *COLUMNS[2:])
    rows = [row(c) for c in record["cells"]]
    if unit:
        rows = [(*line[:2], f"{c[size]:,}{unit}", *line[2:]) for line, c in zip(rows, record["cells"], strict=True)]
    return title(record), columns, rows, 2


def row(cell: Cell) -> tuple[str, ...]:
    """A cell's line of the table, as COLUMNS; what was not measured says so in place of its time."""
    first = (model_name(cell), form_name(cell), f"{cell['tokens']:,}", f"{cell['batch']:,}")
    if cell["status"] not in ("measured", OVER):
        return (*first, cell["status"], *[""] * (len(COLUMNS) - len(first) - 1))
    return (
        *first,
        time_text(cell),
        "" if cell["sequences_per_second"] is None else f"{cell['sequences_per_second']:,.4g}",
        binary_size(cell["peak_bytes"]),
        binary_size(cell["forward_bytes"]),
        operations(cell["counted_flops"]),
        operations(cell["operator_flops"]),
    )


def model_name(cell: Mapping[str, Any]) -> str:
    """The text of a cell's, or a line's, model without its form, which stands beside it."""
    return " ".join(word for word in cell["model"].split() if not word.startswith(FORM_KEY))


def time_text(cell: Cell) -> str:
    """A cell's time, "about" an estimated one; why there is none, where there is none; nothing for a form that a model does not have."""
    if cell["status"] == OVER and cell["estimated_ms"] is not None:
        return f"about {milliseconds(cell['estimated_ms'])}"
    if cell["status"] != "measured":
        return cell["status"].replace("not available here", "")
    return milliseconds(cell["median_ms"])


def memory_text(cell: Cell) -> str:
    """A cell's peak memory; why it was not measured, where it was not."""
    if cell["peak_bytes"] is not None:
        return binary_size(cell["peak_bytes"])
    return "" if cell["status"] in ("measured", OVER) else time_text(cell)


def form_name(cell: Cell) -> str:
    """Form and chunk of a cell, "-" for a model without forms."""
    return f"{cell['form']} {cell['chunk_size']}" if cell["chunk_size"] else cell["form"] or ONLY


def operations(number: float | None) -> str:
    """Three digits with a decimal prefix."""
    if number is None:
        return ""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g}"


def short_tables(record: Record) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]], int]]:
    """Time and memory of each form by size, empty where a model has no such form, and the line through the recurrent form's memory."""
    found = [
        ("Time of a forward pass", *_by_size(record, time_text)),
        ("Peak memory of a forward pass, weights and inputs included", *_by_size(record, memory_text)),
    ]
    if record["fits"]:
        found.append(("Memory of the recurrent form", FIT_COLUMNS, [_fit_row(fit) for fit in record["fits"]], 1))
    return found


def _by_size(record: Record, text: Callable[[Cell], str]) -> tuple[tuple[str, ...], list[tuple[str, ...]], int]:
    size = record["settings"]["axis"]
    unit = " px" if size == "resolution" else " tokens"
    sizes = list(dict.fromkeys(c[size] for c in record["cells"]))
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for c in record["cells"]:
        lines.setdefault((model_name(c), form_name(c)), {})[c[size]] = text(c)
    rows = [(*key, *(line.get(n, "") for n in sizes)) for key, line in lines.items()]
    return ("model", "form", *(f"{n:,}{unit}" for n in sizes)), rows, 2


def _fit_row(fit: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        model_name(fit),
        f"{fit['shortest']:,} to {fit['longest']:,}",
        f"{fit['bytes_per_token']:,.0f}",
        f"{fit['predicted_bytes_per_token']:,.0f}",
        ratio(fit["over_predicted"]),
        f"{fit['r_squared']:.5f}",
        f"{fit['intercept_bytes'] / 2**20:,.1f} MiB",
        f"{fit['state_size']:,}" if fit["state_constant"] and fit["state_size"] is not None else "not constant",
    )


def title(record: Record) -> str:
    """Sizes and settings in one line."""
    s = record["settings"]
    batch = f"B L about {s['tokens']:,}" if s["tokens"] else f"batch {s['batch']}"
    what = {"off": "not compiled", "model": "the model compiled", "graphs": "the model in CUDA graphs"}[s["compile"]]
    overrides = f", {' '.join(s['overrides'])}" if s["overrides"] else ""
    subject = "images" if s["resolutions"] else "sequences of values"
    return f"Forward pass in inference, {subject}, {batch}, {s['dtype']}, {what}{overrides}"


def notes(record: Record) -> list[str]:
    """What the columns mean."""
    s, environment = record["settings"], record["environment"]
    load = f"load average {environment['load_average'][0]} before, {record['load_average_after']} after"
    method = environment["memory_method"]
    unseen = ", scratch space inside a single kernel not seen" if method == LIVE_TENSORS else ""
    memory = f"weights, inputs and what the pass adds ({method}{unseen}), without gradients; pass alone: what it adds"
    if s["compile"] == "graphs":
        memory = "not told: CUDA graphs take their memory once, all models together; --compile off or model tells"
    formulas = "; ".join(f"{form} {formula}" for form, formula in FORMULAS.items())
    found = [
        f"time: median of at least {s['repeats']} passes over a batch, in turns with all else of that size; a second: "
        f"{'images' if s['resolutions'] else 'sequences'}, batch over time; weights and activations in {s['dtype']}.",
        f"spread: {spread(record['cells'])}; {load}.",
        f"peak memory: {memory}.",
        "FLOPs: matrix products of a pass over one sequence as torch counts them; where a form is one step at a time or a kernel, which "
        "torch does not see into, those of the chunkwise form stand for its operator.",
        f"operator, by formula: of one sequence and head, all layers added up: {formulas}; fused as chunkwise (a selective "
        "scan's as recurrent), softmax as parallel; W = Dv + 1 where the output is divided, n directions, C tokens a chunk. Empty for the "
        "delta rule, which is another operator.",
    ]
    if any(c["status"] == OVER for c in record["cells"]):
        found.append(
            f"about: all passes of a cell would have taken more than {s['cell_seconds']:g} s. One was left after two blocks: the second "
            "one's time, times the number of blocks. Its memory is that of these two; the others hold as much, one after the other."
        )
    if record["fits"]:
        found.append(
            f"memory of the recurrent form: least squares of what the pass adds against B L, from L = {SHORTEST} on. Predicted, a count "
            "that is proportional to the width: the larger of what a block must hold for a token at the mixer (residual stream, its norm, "
            "the operator's operands, numerator, denominator, output) and in the MLP (stream, norm, hidden layer before and after its "
            "activation); the inputs of the block and of the first one, still referred to, come on top. State: numbers a sequence, the "
            "same at every size."
        )
    return found


def reasons(record: Record) -> list[str]:
    """Why cells hold nothing, or are not to be trusted, each reason once."""
    told = [c for c in record["cells"] if c["reason"]]
    names = ((f"{model_name(c)} {form_name(c)}", "" if c["status"] == "measured" else f" {c['status']}", c["reason"]) for c in told)
    return list(dict.fromkeys(f"{name}{status}: {reason}" for name, status, reason in names))


def markdown(record: Record) -> str:
    """The whole benchmark as a Markdown page: the short tables, then every cell."""
    lines = head("Models in inference", record)
    lines += [title(record) + ".", ""]
    for name, columns, rows, _ in short_tables(record):
        lines += [f"## {name}", "", *markdown_table(columns, rows), ""]
    _, columns, rows, _ = cells_table(record)
    lines += ["## Every cell", "", *markdown_table(columns, rows), ""]
    for note in (*notes(record), *reasons(record)):
        lines += [note, ""]
    return "\n".join(lines)
