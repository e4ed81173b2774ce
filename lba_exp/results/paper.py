"""The paper's numbers beside ours, from ``paper.yaml``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lba_exp.errors import UserError
from lba_exp.messages import unknown

SOURCE = "arXiv 2502.16249v2"
FILE = Path(__file__).with_name("paper.yaml")
UNITS = ("percent", "ratio")


@dataclass(frozen=True)
class PaperTable:
    """One published table.

    Attributes:
        name, about: its name in ``paper.yaml``, and what it shows.
        units: column -> ``percent`` or ``ratio``.
        values: (row, column) -> the published number; absent where none was published.
        column: the one column that was asked for; None: the one that is named as the data set.
    """

    name: str
    about: str
    units: dict[str, str]
    values: dict[tuple[str, str], float]
    column: str | None = None

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for row, _ in self.values))

    def number(self, row: Sequence[str], column: Sequence[str]) -> tuple[float, str] | None:
        """The published number and its unit for a row and a column of ours, named by the values of their keys; None where there is none."""
        chosen = self.column or _match(column, self.units)
        name = _match(row, self.rows)
        if chosen is None or name is None or (name, chosen) not in self.values:
            return None
        return self.values[name, chosen], self.units[chosen]


def _match(labels: Sequence[str], names: Sequence[str]) -> str | None:
    """The name that a row's (or column's) values spell together, or the one that one of them spells."""
    plain = {_plain(name): name for name in names}
    for label in ("_".join(labels), *labels):
        if _plain(label) in plain:
            return plain[_plain(label)]
    return None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def read_paper(choice: str) -> PaperTable:
    """A published table: ``TABLE``, or ``TABLE:COLUMN`` for one column beside every one of ours.

    Raises:
        UserError: no such table or column.
    """
    tables = yaml.safe_load(FILE.read_text("utf-8"))
    name, _, column = choice.partition(":")
    if name not in tables:
        raise UserError(f"--paper: {unknown(name, tables, 'a table of the paper')}")
    table = tables[name]
    if column and column not in table["columns"]:
        raise UserError(f"--paper {choice}: {unknown(column, table['columns'], f'a column of {name}')}")
    values = {
        (row, c): number
        for row, numbers in table["rows"].items()
        for c, number in zip(table["columns"], numbers, strict=True)
        if number is not None
    }
    return PaperTable(name, table["about"], dict(table["columns"]), values, column or None)
