"""train.log in a run folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lba_exp.results.secrets import redacted


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


@contextmanager
def log_file(folder: Path, *, first: bool = True) -> Iterator[None]:
    """Everything that is logged or warned of goes to train.log in the run folder; Lightning's own remarks go there only.

    Args:
        folder: the run folder.
        first: False for a further process of a run: it writes once the processes are joined, when the first one has begun the folder.
    """
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8", delay=not first)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if not first:
        handler.addFilter(lambda record: torch.distributed.is_initialized())
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
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        warnings.showwarning = shown
        for log, handlers, level, propagate in saved:
            log.handlers, log.propagate = handlers, propagate
            log.setLevel(level)
        handler.close()
