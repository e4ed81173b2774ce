"""What ``export`` is asked for, checked before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lba_exp import messages
from lba_exp.errors import UserError
from lba_exp.export import FORMS, TARGETS

SUFFIXES = {"torch-export": ".pt2", "step": ".pt2", "onnx": ".onnx"}


def check_options(
    source: Any,
    output: Path,
    *,
    to: str,
    form: str | None,
    batch: int | None,
    block: int,
    padding_mask: bool,
    token_types: bool,
    verify: bool,
) -> None:
    """Raises UserError for arguments of ``lba_exp.export.export`` that are wrong or do not go together, for a source that is not there,
    and for an output that is."""
    if to not in TARGETS:
        raise UserError(f"to: {messages.unknown(str(to), TARGETS, 'a format')}")
    if form is not None and form not in FORMS:
        raise UserError(f"form: {messages.unknown(str(form), FORMS, 'a form that can be exported')}")
    for name, value in (("batch", batch), ("block", block)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{name}: expected an integer from 1 up, got {value!r}.")
    if to == "step" and (form is not None or padding_mask or token_types):
        raise UserError("a step has one form, and takes neither padding nor token types: leave form, padding mask and token types out.")
    if to != "step" and block != 1:
        raise UserError(f"block={block} means nothing to {to}: it is the number of tokens of a step.")
    if isinstance(source, str | Path) and not Path(source).expanduser().exists():
        raise UserError(f"{source} does not exist: give a run folder, a checkpoint or a model folder.")
    if output.exists():
        raise UserError(f"{output} exists already: give another output.")
    if output.suffix != SUFFIXES[to] and not (to == "step" and not output.suffix):
        folder = ", or a new folder for the steps of a model that does not read forward alone" if to == "step" else ""
        raise UserError(f"{output}: with {to} give a name that ends in {SUFFIXES[to]}{folder}.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.absolute().parent}: make it first, or give another output.")
