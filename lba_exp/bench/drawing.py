"""The figures of a benchmark from its record: drawn where it was measured, or later and elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lba_exp.errors import RunFolderError, UserError

OPERATOR, MODEL = "operator benchmark", "model benchmark"  # the records that have figures


def save(record: Mapping[str, Any], folder: Path) -> list[str]:
    """Draws the figures that a record's cells are enough for into a folder that exists, in place of those that are there: their names.

    Raises:
        UserError: matplotlib is not installed.
        RunFolderError: the record is none of a benchmark with figures.
    """
    if record.get("kind") not in (OPERATOR, MODEL):
        raise RunFolderError(f"{folder} has a record of the kind {record.get('kind')!r}: of {OPERATOR} and {MODEL} figures are drawn.")
    try:
        if record["kind"] == OPERATOR:
            from lba_exp.bench.figure import draw

            figures = {"figure": draw(record)}
        else:
            from lba_exp.bench.model_figure import figures as draw_all

            figures = draw_all(record)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", format="png", metadata={"Description": record["command"]})
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UserError(
            "matplotlib, which draws the figures, is not installed: result.json is all that they need, elsewhere too."
        ) from None
    return [f"{name}.png" for name in figures]
