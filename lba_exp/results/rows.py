"""Reading metrics.csv, without anything heavy."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv: numbers as int or float, empty cells left out; a last line cut short by a crash is dropped."""
    if not path.is_file():
        return []
    rows = []
    text = path.read_text("utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
    for raw in csv.DictReader(io.StringIO(text)):
        rows.append({k: (int(v) if k in ("step", "epoch") else float(v)) for k, v in raw.items() if k and v not in (None, "")})
    return rows
