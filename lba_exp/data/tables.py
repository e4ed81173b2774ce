"""Tables of texts and labels: a folder with a file for each split, a folder of another kind, or a data set on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lba_exp.data.reading import first_line, pick_splits, read_all
from lba_exp.data.sources import Source
from lba_exp.errors import DataError

FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_NO_QUOTES = 3  # csv.QUOTE_NONE


def read_tables(source: Source, named: Mapping[str, str | None]) -> dict[str, Any]:
    """split -> ``datasets.Dataset``, "train" among them.

    A folder with csv, tsv, jsonl, parquet or arrow files has one for each split, named after it (train.csv, dev.tsv,
    test-00000-of-00002.parquet). Values in a csv file may stand in double quotes; those of a tsv file have none, as GLUE's. "NA", "null"
    and the like are text.

    Args:
        source: from ``resolve_source``.
        named: train, validation and test -> the source's own name of that split; None: the usual names.

    Raises:
        DataError: as ``read_splits``; a file that cannot be read.
    """
    files = _files(source.path) if source.kind == "folder" else {}
    if not files:
        return pick_splits(read_all(source), source.name, named)
    wanted = {name for name in named.values() if name is not None}
    found = {name: paths for name, paths in files.items() if name in wanted} if wanted >= {"train", "validation", "test"} else files
    return pick_splits({name: _read(paths) for name, paths in found.items()}, source.name, named)


def _files(folder: Path) -> dict[str, list[Path]]:
    """Name of a split -> its files, in order; empty for a folder that is no set of tables."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return {}
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in FORMATS and path.is_file():
            found.setdefault(_SHARD.sub("", path.stem), []).append(path)
    for name, paths in found.items():
        if len({path.suffix for path in paths}) > 1:
            raise DataError(f"the split {name} in {folder} is there twice ({', '.join(p.name for p in paths)}): keep one of the files.")
    return found


def _read(paths: list[Path]) -> Any:
    import datasets

    suffix = paths[0].suffix
    options: dict[str, Any] = {}
    if suffix in (".csv", ".tsv"):
        options = {"keep_default_na": False, "encoding": "utf-8-sig"}
    if suffix == ".tsv":
        options |= {"sep": "\t", "quoting": _NO_QUOTES}
    if suffix != ".parquet" and any(not path.stat().st_size for path in paths):
        raise DataError(f"{next(p for p in paths if not p.stat().st_size)} is empty: every split needs samples.")
    try:
        return datasets.load_dataset(FORMATS[suffix], data_files=[str(path) for path in paths], split="train", **options)
    except Exception as error:  # whatever `datasets` trips over in a stranger's file
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if "corresponds to no data" in str(error):
            raise DataError(f"{paths[0]} holds no samples: every split needs some.") from error
        raise DataError(f"{paths[0]} cannot be read as {suffix[1:]}: {first_line(cause)}.") from error
