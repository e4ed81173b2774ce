"""Reads an offline W&B run back from its file: protobuf in LevelDB's log format (32 KiB blocks of crc32c, length, type, data)."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as protocol

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7
FULL, LAST = 1, 4
WAIT = 20.0  # seconds


def records(path: Path) -> list[Any]:
    """The protobuf records of a .wandb file in order. W&B's own process may still be writing its end: the run's exit is waited for."""
    deadline = time.monotonic() + WAIT
    while True:
        found = list(_complete(path.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _complete(data: bytes) -> Iterator[Any]:
    """The records that are there from start to end."""
    assert data[:4] in (b":W&B", b"")
    place, parts = FILE_HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + HEADER])
        if place + HEADER + length > len(data):
            return
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            record = protocol.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def _values(items: Any) -> dict[str, Any]:
    """Items with a key, or a path of keys, and a text of JSON, as one dict."""
    found: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        node = found
        for key in path:
            node = node.setdefault(key, {})
        node[last] = json.loads(item.value_json)
    return found


def summary(folder: Path) -> dict[str, Any]:
    """The summary values of the offline run below a run folder, those with a plain key."""
    found = {}
    for record in records(next(folder.glob("wandb/offline-run-*/*.wandb"))):
        if record.WhichOneof("record_type") == "summary":
            found |= {update.key: json.loads(update.value_json) for update in record.summary.update if update.key}
    return found


def read(folder: Path, number: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]], int | None]:
    """Configuration, history rows and exit code of an offline run below a run folder; ``number``: which, in order of their start."""
    config: dict[str, Any] = {}
    history, code = [], None
    for record in records(sorted(folder.glob("wandb/offline-run-*/*.wandb"))[number]):
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            config |= _values(record.run.config.update if kind == "run" else record.config.update)
        elif kind == "history":
            history.append(_values(record.history.item))
        elif kind == "exit":
            code = record.exit.exit_code
    return config, history, code


def runs(folder: Path) -> list[Any]:
    """The run record (id, names, tags, git, ...) of each offline run below a run folder, the last word of each, in order of their start."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        found.append([record.run for record in records(path) if record.WhichOneof("record_type") == "run"][-1])
    return found


def table(folder: Path, value: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a wandb.Table, from its value in a history row."""
    assert value["_type"] == "table-file"
    content = json.loads(next(folder.glob(f"wandb/offline-run-*/files/{value['path']}")).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
