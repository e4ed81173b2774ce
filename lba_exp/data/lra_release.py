"""The folders of Long Range Arena's own download, lra_release.gz (arXiv 2011.04006): ListOps, Retrieval and Pathfinder.

Their layout is what the benchmark's readers and generators say of it (github.com/google-research/long-range-arena, in lra_benchmarks:
listops/input_pipeline.py, matching/input_pipeline.py, data/listops.py, data/pathfinder.py). Nothing here was run on the download itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lba_exp.data.generate.listops import TOKENS, Sequences
from lba_exp.data.generate.pathfinder import CLASSES
from lba_exp.data.sources import Source
from lba_exp.errors import DataError

LISTOPS = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
AAN = {"train": "new_aan_pairs.train.tsv", "validation": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
HARD = "curv_contour_length_14"  # of the three difficulties the one that results are reported on
_NUMBERS = {token: number for number, token in enumerate(TOKENS) if number}  # 0 is padding
_BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def is_listops(source: Source) -> bool:
    """Whether a source is the folder of ListOps (listops-1000)."""
    return _has_any(source, LISTOPS)


def read_listops(folder: Path) -> dict[str, Sequences]:
    """Tokens, lengths and values of each split; parentheses are left out, as the benchmark's tokeniser does.

    Raises:
        DataError: a file is missing, empty, not UTF-8 or has other columns than Source and Target; an unknown token; a value outside 0..9.
    """
    return {split: _listops(folder / name) for split, name in LISTOPS.items()}


def _listops(path: Path) -> Sequences:
    lines = _lines(path)
    _, header = next(lines, (0, []))
    if not {"Source", "Target"} <= set(header):
        raise DataError(f"{path} has the columns {', '.join(header) or 'none'} in its first line: expected Source and Target.")
    source, target = header.index("Source"), header.index("Target")
    tokens, lengths, labels = bytearray(), [], []
    for number, fields in lines:
        if len(fields) != len(header):
            raise DataError(f"{path}, line {number}: {len(fields)} columns where the first line has {len(header)}.")
        if fields[target] not in tuple("0123456789"):
            raise DataError(f"{path}, line {number}: the value {fields[target]!r} is out of range: expected 0 to 9.")
        words = fields[source].replace("(", "").replace(")", "").split()
        if not words:
            raise DataError(f"{path}, line {number}: there are no tokens in Source.")
        try:
            tokens += bytes(map(_NUMBERS.__getitem__, words))
        except KeyError as error:
            raise DataError(f"{path}, line {number}: {error.args[0]!r} is no token of ListOps: {' '.join(_NUMBERS)}.") from None
        lengths.append(len(words))
        labels.append(int(fields[target]))
    if not lengths:
        raise DataError(f"{path} holds no samples: every split needs some.")
    return Sequences(np.frombuffer(bytes(tokens), np.uint8), np.array(lengths, np.int64), np.array(labels, np.uint8))


def is_aan(source: Source) -> bool:
    """Whether a source is the folder of Retrieval (tsv_data)."""
    return _has_any(source, AAN)


def read_aan(folder: Path, characters: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """split -> ``datasets.Dataset`` with the columns text1, text2 and label (0, or 1 where the papers are related), and remarks.

    A line holds label, two identifiers and two texts; nothing is quoted and there is no header. A line with another number of fields is
    left out and counted.

    Args:
        characters: of each text that are kept: the files are several GB, and a model reads the first 4,000.

    Raises:
        DataError: a file is missing, empty or not UTF-8, more than 1 of 100 of its lines have another number of fields, or a label is
            neither 0 nor 1.
    """
    found, notes = {}, []
    for split, name in AAN.items():
        found[split], skipped = _aan(folder / name, characters)
        if skipped:
            notes.append(f"{name}: {skipped:,} lines without five fields are left out.")
    return found, notes


def _aan(path: Path, characters: int | None) -> tuple[Any, int]:
    import datasets

    columns: dict[str, list] = {"text1": [], "text2": [], "label": []}
    skipped, example = 0, (0, 0)
    for number, fields in _lines(path):
        if len(fields) != 5:
            skipped, example = skipped + 1, (number, len(fields))
            continue
        if fields[0] not in _BINARY:
            raise DataError(f"{path}, line {number}: the label {fields[0][:20]!r} is out of range: expected 0 or 1.")
        for column, value in zip(columns, (fields[3][:characters], fields[4][:characters], _BINARY[fields[0]]), strict=True):
            columns[column].append(value)
    total = skipped + len(columns["label"])
    if skipped > total / 100:
        raise DataError(
            f"{path}: {skipped:,} of {total:,} lines have not the five columns label, id1, id2, text1, text2, separated by tabs "
            f"(line {example[0]} has {example[1]})."
        )
    if not columns["label"]:
        raise DataError(f"{path} holds no samples: every split needs some.")
    text = datasets.Value("string")
    features = datasets.Features(text1=text, text2=text, label=datasets.ClassLabel(names=["unrelated", "related"]))
    return datasets.Dataset.from_dict(columns, features=features), skipped


def pathfinder_folder(source: Source) -> Path | None:
    """The folder of one difficulty (curv_contour_length_14), or that one in the folder of a size (pathfinder32); None for other sources."""
    if source.kind != "folder":
        return None
    return next((path for path in (source.path, source.path / HARD) if (path / "metadata").is_dir()), None)


def read_pathfinder(folder: Path) -> tuple[Any, list[str]]:
    """A ``datasets.Dataset`` with the columns image and label (1: connected), in the order of the metadata's files, and remarks.

    There are no splits: the benchmark takes 80, 10 and 10% of an order that its packing of the files makes and that the folder does not
    show; ours are drawn, see ``lba_exp.data.labels.cut_splits``. Empty files (the download has one) are left out, as in the benchmark.

    Raises:
        DataError: no metadata, a line that lacks a field, a label that is neither 0 nor 1, an image that is not there.
    """
    import datasets

    files = sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))  # 0.npy, 1.npy, ... 10.npy
    if not files:
        raise DataError(f"{folder / 'metadata'} holds no .npy files, which list the images: every split needs samples.")
    images, labels, empty = [], [], 0
    for path in files:
        for number, fields in _lines(path, None):
            where = f"{path}, line {number}"
            if len(fields) < 4:
                raise DataError(f"{where}: {len(fields)} fields: expected folder, name, number and label of an image.")
            if fields[3] not in _BINARY:
                raise DataError(f"{where}: the label {fields[3]!r} is out of range: expected 0 or 1.")
            image = folder / fields[0] / fields[1]
            try:
                size = image.stat().st_size
            except OSError:
                raise DataError(f"{where}: the image {image} is missing.") from None
            if not size:
                empty += 1
                continue
            images.append(str(image))
            labels.append(_BINARY[fields[3]])
    if not images:
        raise DataError(f"{folder} lists no images: every split needs samples.")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    notes = [f"{folder.name}: {empty:,} empty files are left out."] if empty else []
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features), notes


def _has_any(source: Source, files: dict[str, str]) -> bool:
    return source.kind == "folder" and any((source.path / name).is_file() for name in files.values())


def _lines(path: Path, separator: str | None = "\t") -> Iterator[tuple[int, list[str]]]:
    """(number, fields) of each line that is not blank, one after the other; raises DataError."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n").split(separator)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {path.parent} lacks a split of the download.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({str(error).rstrip('.')}).") from None
