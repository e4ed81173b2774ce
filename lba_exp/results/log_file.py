"""train.log in a run folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Everything that is logged or warned of goes to train.log in the run folder; Lightning's own remarks go there only."""
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    names = ("lightning", "lightning.pytorch", "lightning.fabric", "lba_exp")
    shown = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        logging.getLogger("lba_exp").warning("%s", message)
        shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    saved = []
    for name in names:
        log = logging.getLogger(name)
        saved.append((log, list(log.handlers), log.level, log.propagate))
        log.handlers, log.propagate, log.disabled = [handler], False, False  # Hydra disables loggers between the runs of a sweep
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        warnings.showwarning = shown
        for log, handlers, level, propagate in saved:
            log.handlers, log.propagate = handlers, propagate
            log.setLevel(level)
        handler.close()
