"""What the commands share: one sentence and exit code 1 for a mistake."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lba_exp.errors import UserError


def fail(command: str, sentence: str) -> None:
    """Prints a mistake as one sentence on stderr."""
    print(f"{command}: {' '.join(str(sentence).split())}", file=sys.stderr, flush=True)


def check_output(path: Path | None) -> None:
    """Raises UserError, before any work is done, where a new file cannot be written at ``path``; None passes."""
    if path is None:
        return
    if path.exists():
        raise UserError(f"{path} exists already: give another --output.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"--output {path}: there is no folder {folder}: make it first, or give another --output.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {path}: the folder {folder} may not be written: give another --output.")
