"""Folders that ``lba-data`` wrote: the files of a data set, and a manifest that says what they are and that they are whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lba_exp.errors import DataError

MANIFEST = "manifest.json"
WRITER = "lba-data"
KINDS = {"images": "images", "tokens": "sequences of tokens", "table": "a table", "vocabulary": "a vocabulary"}


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        name: of the data set, as ``lba-data list`` has it.
        kind: one of KINDS.
        version: of the code that made it.
        specification: the rule that samples were drawn by, or the packages that they were taken from.
        seed: of what was drawn; None where nothing was.
        splits: split -> number of samples.
        files: name -> {"bytes": size, "sha256": hexadecimal digest}.
        written_by: always WRITER.
    """

    name: str
    kind: str
    version: int
    specification: dict[str, Any]
    seed: int | None
    splits: dict[str, int]
    files: dict[str, dict[str, Any]]
    written_by: str = WRITER

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the content of all files."""
        content = {name: facts["sha256"] for name, facts in self.files.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(facts["bytes"] for facts in self.files.values())


def is_prepared(folder: Path) -> bool:
    """Whether ``folder`` has a manifest of ``lba-data``, or one that cannot be read."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        found = json.loads((folder / MANIFEST).read_text("utf-8"))
    except ValueError:
        return True
    return isinstance(found, dict) and found.get("written_by") == WRITER


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; raises DataError where there is none, or none that can be read."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}: it is no folder that `{WRITER} prepare` wrote.")
    try:
        found = Manifest(**json.loads(path.read_text("utf-8")))
        whole = found.written_by == WRITER and found.kind in KINDS and all({"bytes", "sha256"} <= f.keys() for f in found.files.values())
    except (ValueError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"{path} cannot be read as a manifest of {WRITER}: delete {folder} and prepare it again.")
    return found


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises DataError where a file of the folder is not the one that its manifest lists."""
    again = f"delete {folder} and run `{WRITER} prepare {manifest.name} {folder}` again"
    for name, facts in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing, which {folder / MANIFEST} lists: {again}.")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise DataError(f"{path} has {size:,} bytes and not the {facts['bytes']:,} that {folder / MANIFEST} lists: {again}.")
        if digest(path) != facts["sha256"]:
            raise DataError(f"{path} was changed since it was written (its sha256 is not the one in {folder / MANIFEST}): {again}.")


def write_prepared(folder: Path, fill: Callable[[Path], Mapping[str, int]], **about: Any) -> Manifest:
    """Writes a data set beside ``folder``, and moves it there in one step once it is whole; nothing stays of one that fails.

    Args:
        folder: does not exist, or is empty; its parents are made.
        fill: writes the files into a folder, and returns split -> number of samples.
        about: name, kind, version, specification and seed of the manifest.

    Raises:
        DataError: the folder cannot be written, or came to hold something else meanwhile.
    """
    folder = folder.absolute()
    work = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        splits = dict(fill(work))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in sorted(work.iterdir())}
        manifest = Manifest(**about, splits=splits, files=files)
        (work / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", "utf-8")
        work.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner alone
        os.replace(work, folder)
    except OSError as error:
        said = ": ".join(str(part) for part in (error.strerror, error.filename) if part) or type(error).__name__
        raise DataError(f"{folder} cannot be written ({said}).") from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return manifest


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
