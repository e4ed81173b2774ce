"""Reads an offline W&B run back from its file: protobuf in LevelDB's log format (32 KiB blocks of crc32c, length, type, data)."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as protocol

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file in order."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = FILE_HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + HEADER])
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            record = protocol.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def summary(folder: Path) -> dict[str, Any]:
    """The summary values of the offline run below a run folder, those with a plain key."""
    found = {}
    for record in records(next(folder.glob("wandb/offline-run-*/*.wandb"))):
        if record.WhichOneof("record_type") == "summary":
            found |= {update.key: json.loads(update.value_json) for update in record.summary.update if update.key}
    return found


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int | None]:
    """Configuration (with group, name and tags), history rows and exit code of the offline run below a run folder."""
    config: dict[str, Any] = {}
    history, code = [], None
    for record in records(next(folder.glob("wandb/offline-run-*/*.wandb"))):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
            config |= {"group": record.run.run_group, "display_name": record.run.display_name, "tags": list(record.run.tags)}
        elif kind == "history":
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        elif kind == "exit":
            code = record.exit.exit_code
    return config, history, code
