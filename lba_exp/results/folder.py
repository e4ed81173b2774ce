"""A run's folder: claimed by one process, written atomically, never overwritten silently."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from lba_exp.errors import FolderInUseError, RunFolderError
from lba_exp.results import naming

_held: dict[Path, int] = {}


def write_atomically(path: Path, text: str) -> None:
    """Writes beside the target, forces it to disk, and renames: a reader sees the old file or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a run folder (``result.json``); None where there is none.

    Raises:
        RunFolderError: the file is no record.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        return record | {"status": record["status"]}
    except (ValueError, TypeError, KeyError):
        raise RunFolderError(f"{path} is not a run's record: give another folder= or name=.") from None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes ``result.json`` atomically; not-a-number and infinity are written as null, as JSON has no word for them."""
    write_atomically(folder / "result.json", json.dumps(finite(record), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The same structure with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def read_config(folder: Path) -> DictConfig:
    """The resolved configuration in a run folder.

    Raises:
        RunFolderError: there is none.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunFolderError(f"{folder} is no run folder: it has no config.yaml.")
    try:
        cfg = OmegaConf.load(path)
        if "origin" in cfg and "model" in cfg:
            return cfg
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, OSError):
        pass
    raise RunFolderError(f"{path} is not a run's configuration: give another folder= or name=.")


def check_is_ours(folder: Path) -> None:
    """Raises RunFolderError where a folder holds something, and that is no run."""
    if any(p.name not in (".lock", "wandb_id") for p in folder.iterdir()):
        read_config(folder)


class Claim:
    """Holds a run folder for this process.

    The lock is a POSIX record lock: the kernel drops it when the process dies, however it dies, and children do not inherit it, so that
    data workers which outlive a killed run hold nothing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self._new = [p for p in (folder, *folder.parents) if not p.exists()]
        except OSError as error:
            raise RunFolderError(f"the run folder {folder} cannot be used ({error.strerror}): give another root= or folder=.") from None

    def __enter__(self) -> Claim:
        if self.folder in _held:
            raise FolderInUseError(f"{self.folder} is in use by a run of this process: wait for it, or give another name= or seed=.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunFolderError(
                f"the run folder {self.folder} cannot be written ({error.strerror}): give another root= or folder=."
            ) from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise FolderInUseError(f"{self.folder} is in use by another process: wait for it, or give another name= or seed=.") from None
        _held[self.folder] = descriptor
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(_held.pop(self.folder))

    def abandon(self) -> None:
        """Removes the folder where this claim made it: a run that never began leaves none."""
        if not self._new:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self._new[1:]:
            try:
                path.rmdir()
            except OSError:
                break


def in_use(folder: Path) -> bool:
    """Whether a process holds the run in this folder."""
    if folder in _held:
        return True
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def check_same(cfg: DictConfig, folder: Path) -> None:
    """Raises RunFolderError where the folder holds a run of another configuration."""
    differing = naming.differences(cfg, OmegaConf.to_container(read_config(folder), resolve=True))
    if differing:
        shown = "; ".join(f"{k} is {b} there, {a} here" for k, (a, b) in list(differing.items())[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise RunFolderError(f"{folder} holds a run of another configuration ({shown}{more}): give another name= or folder=.")


def set_aside(folder: Path) -> Path:
    """Renames the content of an unfinished run into a numbered folder beside it, so that ``resume=never`` destroys nothing."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.aside{number}")).exists():
        number += 1
    target.mkdir()
    for path in folder.iterdir():
        if path.name != ".lock":
            os.replace(path, target / path.name)
    return target
