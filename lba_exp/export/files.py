"""Exported files: made beside their place and moved there when they are right, and what they say about themselves."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from lba_exp.errors import UserError

METADATA = "metadata.json"  # in a .pt2 archive's extra files, and in a folder of steps
PROPERTY = "lba_exp"  # the same text among the metadata of an ONNX file


@contextmanager
def new(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file or a folder to, which gets the name of ``path`` in the end, and is removed after an error.

    Raises:
        UserError: ``path`` exists already, or cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists already: give another output.")
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield part
        os.rename(part, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}).") from None
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def needs(*packages: str) -> None:
    """Raises UserError where a package of the extra ``onnx`` is missing."""
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            raise UserError(f"ONNX needs the package {package}, which is not installed: pip install 'lba-exp[onnx]'.") from None


def read_metadata(path: Path) -> dict[str, Any]:
    """See ``lba_exp.export.read_metadata``."""
    try:
        if path.is_dir():
            return json.loads((path / METADATA).read_text("utf-8"))
        if path.suffix == ".onnx":
            needs("onnx")
            import onnx

            return json.loads({p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}[PROPERTY])
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(f"/{METADATA}"))
            return json.loads(archive.read(name))
    except UserError:
        raise
    except Exception:  # other readers' errors are of many kinds
        raise UserError(f"{path} is no file that lba-export wrote.") from None
