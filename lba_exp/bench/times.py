"""Training steps over that of softmax attention at the paper's sizes, beside the paper's own ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from lba_exp.bench import steps, steps_report
from lba_exp.bench.report import head, markdown_table, milliseconds, print_table, ratio, write_files
from lba_exp.bench.step_settings import StepSettings
from lba_exp.bench.time_settings import paper_time
from lba_exp.results.paper import SOURCE
from lba_exp.results.screen import binary_size

COLUMNS = ("size", "model", "attention", "parameters", "step", "x softmax", "paper", "peak memory", "x softmax's")
TORCHS, OURS, THEIRS = "torch's", "ours", "our implementation"
PUBLISHED = ("hydra", "vim")  # kinds of mixers whose paper's times are those of their authors' implementations

Record = Mapping[str, Any]


def measure(
    configurations: Mapping[str, Mapping[str, DictConfig]],
    settings: Mapping[str, StepSettings],
    device: torch.device,
    tell: Callable[[str, int], None],
) -> Iterator[list[dict[str, Any]]]:
    """The cells of one size after the other: those of ``steps.measure``, with ``size``, ``paper`` (its ratio, or None) and ``attention``.

    Arguments as of ``time_settings`` and ``steps.measure``.
    """
    for size, models in configurations.items():
        cells = steps.measure(models, settings[size], device, lambda text, done, size=size: tell(text and f"{size}, {text}", done))
        for cell in cells:
            attention = _attention(models[cell["model"]].model.mixer.kind)
            cell |= {"size": size, "paper": paper_time(size, cell["model"]), "attention": attention}
        yield cells


def _attention(kind: str) -> str:
    """Whose the mixers of a kind are."""
    return TORCHS if kind == "softmax" else THEIRS if kind in PUBLISHED else OURS


def write_tables(record: Record, folder: Path) -> None:
    """Write the record and both tables into a folder that exists."""
    write_files(record, folder, markdown(record), steps_report.comma_separated(record))


def show(record: Record) -> None:
    """Print what the columns mean, why models were not measured, and the table."""
    console = Console(width=10_000, highlight=False)  # rich would cut what is wider than the terminal
    for line in notes(record):
        console.print(Text(line, style="dim"))
    for line in steps_report.reasons(record):
        console.print(Text(line, style="yellow"))
    print_table(console, title(record), COLUMNS, [row(cell) for cell in record["cells"]], 3)


def row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """A model's line of the table, as COLUMNS; one that was not measured says so in place of its time."""
    first = (cell["size"], cell["model"], cell["attention"], "" if cell["parameters"] is None else f"{cell['parameters']:,}")
    if cell["status"] != "measured":
        return (*first, cell["status"], "", ratio(cell["paper"]), "", "")
    return (
        *first,
        milliseconds(cell["median_ms"]),
        ratio(cell["over_first"]),
        ratio(cell["paper"]),
        binary_size(cell["peak_bytes"]),
        ratio(cell["peak_over_first"]),
    )


def title(record: Record) -> str:
    """Settings in one line."""
    return steps_report.title(record | {"cells": []})


def notes(record: Record) -> list[str]:
    """What the columns mean."""
    return [
        f"attention: {TORCHS}: scaled_dot_product_attention; {OURS}: in the form that the settings name (auto: kernels, on a GPU); "
        f"{THEIRS}: of a published mixer, whose time in the paper is that of its authors' code, so that ours beside it says nothing of the "
        "speed of the method. Every mixer stands in the same blocks.",
        f"paper: training time over DeiT's ({SOURCE}, ImageNet-1K), its Hydra and Vim in their authors' implementations.",
        *steps_report.notes(record),
    ]


def markdown(record: Record) -> str:
    """The whole benchmark as a Markdown page."""
    lines = head("Training times beside the paper's", record)
    lines += [f"## {title(record)}", "", *markdown_table(COLUMNS, [row(cell) for cell in record["cells"]]), ""]
    for note in (*notes(record), *steps_report.reasons(record)):
        lines += [note, ""]
    return "\n".join(lines)
