"""What is made of a data set once and kept for further runs: each in a folder of its own, whose manifest says of what it was made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lba_exp.data.prepared import MANIFEST, digest
from lba_exp.errors import DataError


def kept(what: str, made_of: Mapping[str, Any], make: Callable[[Path], None], cache: str | None = None) -> Path:
    """The folder with what ``make`` writes; it is called where there is none yet, by one process while the others wait.

    Args:
        what: the beginning of the folder's name.
        made_of: all that decides the content, the version of the code that makes it among them; plain types.
        make: writes files into an empty folder.
        cache: the folder that holds all of them; None: lba_exp in the cache of ``datasets`` (HF_DATASETS_CACHE).

    Raises:
        DataError: a folder that was made of something else, or changed since; a cache that cannot be written.
    """
    import datasets
    from filelock import FileLock

    root = Path(cache).expanduser().absolute() if cache else Path(datasets.config.HF_DATASETS_CACHE) / "lba_exp"
    key = json.loads(json.dumps(made_of, sort_keys=True))
    folder = root / f"{what}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{folder.name}.lock"):
            if folder.exists():
                _check(folder, key)
            else:
                _write(folder, key, make)
    except OSError as error:
        said = ": ".join(str(part) for part in (error.strerror, error.filename) if part) or type(error).__name__
        raise DataError(f"nothing can be kept in {root} ({said}): give data.cache=FOLDER, one that can be written.") from None
    return folder


def _write(folder: Path, key: Mapping[str, Any], make: Callable[[Path], None]) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        make(work)
        files = {path.name: digest(path) for path in sorted(work.iterdir())}
        (work / MANIFEST).write_text(json.dumps({"made_of": key, "sha256": files}, indent=2) + "\n", "utf-8")
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check(folder: Path, key: Mapping[str, Any]) -> None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        made_of, files = manifest["made_of"], manifest["sha256"].items()
        wrong = [name for name, value in files if not (folder / name).is_file() or digest(folder / name) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{folder} has no {MANIFEST} that can be read: delete the folder, and it is made again.") from None
    if made_of != key:
        other = [name for name in {**made_of, **key} if made_of.get(name) != key.get(name)]
        raise DataError(f"{folder} was made of something else than this run's data ({', '.join(other)}): delete it, and it is made again.")
    if wrong:
        raise DataError(f"{folder / wrong[0]} is missing or was changed since it was written: delete {folder}, and it is made again.")
