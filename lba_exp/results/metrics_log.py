"""metrics.csv: one row per optimizer step that logged anything, kept across an interruption without a gap or a repetition."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from lba_exp.results.folder import write_atomically
from lba_exp.results.rows import read_rows


class MetricsLog(Logger):
    """A Lightning logger that writes ``metrics.csv``.

    Rows with the same step are one row. The file is appended to; it is written anew, atomically, when a column appears or a row changes.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.rows = read_rows(self.path)
        self._columns: list[str] = list(dict.fromkeys(k for row in self.rows for k in row))
        self._written = -1  # rows that stand in the file as they are; -1: the file must be written anew

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run folder holds config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds numbers to the row of ``step`` (number of optimizer steps done)."""
        step = int(step or 0)
        if self.rows and self.rows[-1]["step"] == step:
            row = self.rows[-1]
            self._written = min(self._written, len(self.rows) - 1)
        else:
            row = {"step": step}
            self.rows.append(row)
        row.update({k: (int(v) if k == "epoch" else float(v)) for k, v in metrics.items() if k != "step"})
        new = [k for k in row if k not in self._columns]
        if new:
            self._columns += new
            self._written = -1

    @rank_zero_only
    def keep_until(self, step: int) -> None:
        """Drops the rows after ``step``: those that a resumed run will write again."""
        kept = [row for row in self.rows if row["step"] <= step]
        if len(kept) < len(self.rows):
            self.rows, self._written = kept, -1

    @rank_zero_only
    def save(self) -> None:
        """Brings the file up to date; every row but the newest is then final."""
        if not self.rows:
            return
        final = len(self.rows) - 1  # the newest row may still gain numbers
        if self._written < 0 or self._written > final or not self.path.is_file():
            write_atomically(self.path, self._text(self.rows, header=True))
        elif self._written < len(self.rows):
            with open(self.path, "r+b") as file:
                file.truncate(self._offset)
                file.seek(self._offset)
                file.write(self._text(self.rows[self._written :]).encode())
        else:
            return
        last = self._text(self.rows[final:])
        self._offset = os.path.getsize(self.path) - len(last.encode())
        self._written = final

    def _text(self, rows: list[dict[str, Any]], header: bool = False) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self._columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows({k: (v if isinstance(v, int) else repr(v)) for k, v in row.items()} for row in rows)
        return buffer.getvalue()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
