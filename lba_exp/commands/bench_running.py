"""What the benches of ``lba-bench`` share: their folder, their record, their line of progress, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lba_exp.commands.common import fail
from lba_exp.errors import RunFolderError, UserError
from lba_exp.stopping import number_of, stopped_by_signals, stopper

COMMAND = "lba-bench"


def new_folder(folder: Path | None) -> Path | None:
    """``--output``; raises RunFolderError where it exists."""
    if folder is not None and folder.exists():
        raise RunFolderError(f"--output {folder} exists already: give a new folder.")
    return folder


def make(folder: Path | None) -> None:
    """Makes the folder; raises RunFolderError where that cannot be."""
    if folder is not None:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise RunFolderError(f"--output {folder} cannot be made ({error.strerror}): give another folder.") from None


def begin(kind: str, command: str, machine: Any, device: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """A record without cells."""
    from lba_exp.results.git import git_state

    return {
        "kind": kind,
        "status": "running",
        "command": command,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "environment": machine.environment(device),
        "settings": settings,
        "cells": [],
    }


def fill(
    record: dict[str, Any],
    number: int,
    measure: Callable[[Callable[[str, int], None]], Iterable[list[dict[str, Any]]]],
    finish: Callable[[], Mapping[str, Any]],
    report: Any,
    folder: Path | None,
    key: str,
) -> int:
    """Takes in the cells as they come, shows and writes the record, whatever ends it; returns the exit code.

    Args:
        record: from ``begin``.
        number: of cells in all.
        measure: given ``tell``, yields some cells at a time.
        finish: what the record holds beside its cells, made from them.
        report: a module with ``write_tables`` and ``show``.
        folder: None: nothing is written.
        key: of a cell, names it where it failed.
    """
    cells, stopped = record["cells"], None
    try:
        with progress(number) as tell, stopped_by_signals():
            for found in measure(tell):
                cells += found
                if folder is not None:  # a process that is killed leaves what it had
                    record.update(finish())
                    report.write_tables(record, folder)
        record["status"] = "finished"
    except KeyboardInterrupt as stop:
        record["status"], stopped = "interrupted", number_of(stop)
    except BaseException:
        record["status"] = "failed"
        raise
    finally:
        record.update(finish())
        if folder is not None:  # before the screen, which may be a pipe that is closed
            report.write_tables(record, folder)
            missing = _draw(record, folder)
        report.show(record)
        if folder is not None:
            print(f"written to {folder}")
            if missing is not None:
                fail(COMMAND, missing)
    if stopped is not None:
        fail(COMMAND, f"stopped by {stopper(stopped)} after {len(cells)} of {number} cells.")
        return 128 + stopped
    return tell_failures(cells, key, number)


def _draw(record: Mapping[str, Any], folder: Path) -> str | None:
    """Draws the figures of a benchmark that has some; or why there are none."""
    from lba_exp.bench import drawing

    if record["kind"] not in (drawing.OPERATOR, drawing.MODEL):
        return None
    try:
        drawing.save(record, folder)
    except UserError as error:
        return f"{error} {COMMAND} figures {folder} draws them."
    return None


def tell_failures(cells: list[dict[str, Any]], key: str, number: int) -> int:
    """Says on stderr which cells failed, where some did; returns the exit code."""
    broken = [cell for cell in cells if cell["status"] == "failed"]
    if broken:
        fail(COMMAND, f"{len(broken)} of {number} cells failed, the first one ({broken[0][key]}) with: {broken[0]['reason']}")
    return 1 if broken else 0


def progress(total: int) -> Any:
    """A line of progress on stderr where that is a terminal: a context that gives ``tell(what is done, cells done since)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def showing():
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        # redrawn by tell alone: a thread of its own would take time from what is measured
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal, auto_refresh=False) as bar:
            task = bar.add_task("", total=total)

            def tell(text: str, done: int) -> None:
                bar.update(task, advance=done, **({"description": text} if text else {}), refresh=True)

            yield tell

    return showing()
