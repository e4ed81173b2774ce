"""From a source to the splits that it has, as ``datasets.Dataset``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np

from lba_exp.data.catalogue import check
from lba_exp.data.prepared import KINDS, is_prepared
from lba_exp.data.sources import Source, nearest_embedded
from lba_exp.errors import DataError
from lba_exp.messages import unknown

SHOWN = 5  # unreadable images that are named
ALIASES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}


def read_splits(source: Source) -> dict[str, Any]:
    """split -> ``datasets.Dataset`` for those of train, validation and test that the source has; "train" is always among them.

    Raises:
        DataError: nothing readable in the folder, no answer from the hub, no such data set, no training split, an empty split.
    """
    return pick_splits(read_all(source), source.name, {})


def read_all(source: Source) -> Mapping[str, Any]:
    """All that a source has, by its own names of the splits; raises DataError."""
    if source.kind == "embedded":
        return {"train": digits()}
    return _read_folder(source.path) if source.kind == "folder" else _read_hub(source)


def stream_splits(source: Source, named: Mapping[str, str | None]) -> dict[str, Any]:
    """split -> ``datasets.IterableDataset``, read while it is iterated over; ``named`` and errors as of ``pick_splits``."""
    if source.kind == "embedded":
        raise DataError(f"{source.name} holds images, and no texts: give a folder or a hub name (data.source).")
    found = _read_folder(source.path, streaming=True) if source.kind == "folder" else _read_hub(source, streaming=True)
    return pick_splits(found, source.name, named)


def pick_splits(found: Mapping[str, Any], name: str, named: Mapping[str, str | None]) -> dict[str, Any]:
    """train, validation and test of what a source called ``name`` has.

    Args:
        named: split -> the source's own name of it; None, or none given: the usual names.

    Raises:
        DataError: no split of that name, no training split, an empty split.
    """
    splits = {split: found[alias] for split, aliases in ALIASES.items() for alias in reversed(aliases) if alias in found}
    for split, own in named.items():
        if own is None:
            continue
        if own not in found:
            raise DataError(unknown(own, found, f"a split of {name} (data.{split}_split)"))
        splits[split] = found[own]
    if "train" not in splits:
        raise DataError(f"{name} has no split named train: it has {', '.join(map(str, found)) or 'none'}.")
    for split, dataset in splits.items():
        if isinstance(dataset, Sized) and not len(dataset):
            raise DataError(f"the {split} split of {name} is empty: every split needs samples.")
    return splits


def drop_unreadable(splits: Mapping[str, Any], column: str, name: str, workers: int) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """The splits of a source called ``name`` without the images that cannot be read; how many those are, by split, and what to tell.

    Raises:
        DataError: no such column, or a split of which no image can be read.
    """
    from lba_exp.data.pixels import readable

    kept, skipped, notes = {}, {}, []
    for split, dataset in splits.items():
        where = f"{name}, {split} split"
        kept[split], names = readable(dataset, column, where, workers)
        if names:
            skipped[split] = len(names)
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            notes.append(f"{where}: {len(names):,} of {len(dataset):,} images cannot be read and are skipped: {shown}.")
    return kept, skipped, notes


def digits() -> Any:
    """scikit-learn's 1,797 handwritten digits as a ``datasets.Dataset``: image (8 x 8, grey, 0..240 in steps of 15), label (10 classes)."""
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits

    table = load_digits()
    images = [Image.fromarray(image) for image in (table.images * 15).astype(np.uint8)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in table.target_names]))
    return datasets.Dataset.from_dict({"image": images, "label": table.target.tolist()}, features=features)


def check_column(dataset: Any, column: str, setting: str, where: str) -> None:
    """Raises DataError where ``dataset`` lacks ``column``, with the columns that there are and the nearest."""
    if column not in dataset.column_names:
        raise DataError(f"{where}: {unknown(column, dataset.column_names, f'a column (data.{setting})')}")


def first_line(error: Exception) -> str:
    """What an exception says, without its later lines and final stop; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _read_folder(path: Path, *, streaming: bool = False) -> Mapping[str, Any]:
    import datasets

    if is_prepared(path):
        manifest = check(path)
        if manifest.kind != "table":
            kind = {"images": "pathfinder", "tokens": "listops"}.get(manifest.kind)
            hint = f"give data={kind}" if kind else f"give data.vocabulary={path / next(iter(manifest.files))}, and other data"
            raise DataError(f"{path} holds {manifest.name}, {KINDS[manifest.kind]}, and not a table: {hint}.")
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            saved = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return {split: found.to_iterable_dataset() for split, found in saved.items()} if streaming else saved
        return datasets.load_dataset(str(path), streaming=streaming)
    except Exception as error:  # whatever `datasets` trips over in a stranger's folder
        if empty := _empty_split(path, error):
            raise DataError(f"the {empty} split of {path.name} is empty: every split needs samples.") from error
        holds = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise DataError(
            f"the data folder {path} cannot be read (it holds {holds}): expected train.parquet and test.parquet, "
            f"a folder written by save_to_disk, or images as train/CLASS/*.png; {first_line(error)}."
        ) from error


def _empty_split(path: Path, error: Exception) -> str | None:
    """The split without samples that `datasets` stumbled over, if it was one: it says so for parquet, not for its own format."""
    said = re.search(r'"(\w+)" corresponds to no data', str(error))
    if said:
        return said[1]
    saved = ((state.parent.name, json.loads(state.read_text())) for state in sorted(path.glob("*/state.json")))
    return next((split for split, state in saved if not state.get("_data_files")), None)


def _read_hub(source: Source, *, streaming: bool = False) -> Mapping[str, Any]:
    import datasets

    name = source.repository
    try:
        return datasets.load_dataset(name, source.config, streaming=streaming)
    except Exception as error:  # the hub's client raises errors of several libraries
        no_folder = "there is no local folder of that name"
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            said = f"the hub has no open data set {name!r}, and {no_folder}.{nearest_embedded(name)}"
        elif isinstance(error, ConnectionError):
            said = (
                f"no answer from the hub for the data set {name!r} (no network?), and {no_folder}: "
                f"a folder on this machine works without network.{nearest_embedded(name)}"
            )
        else:
            said = f"the data set {name!r} cannot be read from the hub: {first_line(error)}."
        raise DataError(said) from error
