"""In what two runs differ."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from lba_exp.results import naming
from lba_exp.results.folder import read_config
from lba_exp.results.layout import MISSING, Table, Text


def difference_table(first: str | Path, second: str | Path) -> Table:
    """The keys in which the configurations of two run folders differ, those left out that decide nothing (folders, loggers, origin).

    Raises:
        RunFolderError: one of them is no run folder.
    """
    configs = [OmegaConf.to_container(read_config(Path(folder)), resolve=True) for folder in (first, second)]
    known = [naming.comparable(config) for config in configs]
    rows = []
    for key in naming.differences(*configs):
        rows.append([Text(key), *(Text(str(flat[key]) if key in flat else MISSING) for flat in known)])
    notes = [] if rows else ["The two configurations are the same."]
    if any(cell.text == MISSING for row in rows for cell in row):
        notes.append(f"{MISSING}: the run has no such key.")
    return Table("Differing keys of the two configurations", ["key", str(first), str(second)], rows, 3, notes)
