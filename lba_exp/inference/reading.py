"""What ``lba-predict`` is given, as named batches: images, texts, tables, arrays, or a split of a data set."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from lba_exp.data.labels import SPLITS
from lba_exp.errors import DataError
from lba_exp.inference.pictures import Pictures
from lba_exp.inference.predictor import FURTHER, Predictor
from lba_exp.inference.preparing import Batch
from lba_exp.inference.texts import LabelledTexts, ListOps, Texts
from lba_exp.inference.vocabularies import file_of
from lba_exp.messages import unknown

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TABLES = (".csv", ".jsonl", ".parquet")
ARRAYS = (".npy", ".npz")


@dataclass
class Inputs:
    """Inputs with names.

    Attributes:
        total: how many there are.
        batches: (names, batch) one after the other.
    """

    total: int
    batches: Iterator[tuple[list[str], Batch]]


def read_inputs(predictor: Predictor, path: Path, batch_size: int, split: str = "test") -> Inputs:
    """The inputs in a file or folder, ready for the model.

    Args:
        path: an image, or a folder with images in it; a text file, one text a line (blank lines are left out); a table (csv, jsonl,
            parquet) with the columns that the run's data have; an array (npy, or npz with ``inputs`` and perhaps ``padding_mask`` and
            ``token_types``); or a folder that ``data.source`` takes, of which ``split`` is read.

    Raises:
        DataError: nothing there, nothing that this model takes, or something that cannot be read.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(f"{path} does not exist: give an image, a text file, a table, an array, or a folder of images or data.")
    if path.is_dir():
        files = sorted(found for found in path.iterdir() if found.suffix.lower() in IMAGES and found.is_file())
        if not files:
            return _split(predictor, path, split, batch_size)
        _check_takes(predictor, path, Pictures)
        return _listed(predictor, [found.name for found in files], files, batch_size)
    if suffix in IMAGES:
        _check_takes(predictor, path, Pictures)
        return _listed(predictor, [path.name], [path], batch_size)
    if suffix == ".txt":
        _check_takes(predictor, path, Texts, LabelledTexts, ListOps)
        if len(predictor.preparation.columns) > 1:
            columns = " and ".join(predictor.preparation.columns)
            raise DataError(f"the model reads pairs of texts: give a table (csv, jsonl, parquet) with the columns {columns}, not {path}.")
        lines = _text(path).splitlines()
        kept = [(str(number), line) for number, line in enumerate(lines, 1) if line.strip()]
        return _listed(predictor, [name for name, _ in kept], [line for _, line in kept], batch_size, path)
    if suffix in TABLES:
        return _table(predictor, path, batch_size)
    if suffix in ARRAYS:
        return _arrays(predictor, path, batch_size)
    raise DataError(f"{path}: {unknown(suffix or path.name, ('.txt', *TABLES, *ARRAYS, *IMAGES), 'a kind of file that is read')}")


def _check_takes(predictor: Predictor, path: Path, *kinds: type) -> None:
    found = predictor.preparation
    if not isinstance(found, kinds):
        what = "images" if Pictures in kinds else "texts"
        raise DataError(f"{path} holds {what}, and the model in {predictor.path} takes {found.raw or 'arrays alone (.npy, .npz)'}.")


def _listed(predictor: Predictor, names: Sequence[str], items: Sequence[Any], batch_size: int, path: Path | None = None) -> Inputs:
    if not names:
        raise DataError(f"{path} holds no inputs: give one at least.")

    def batches() -> Iterator[tuple[list[str], Batch]]:
        for start in range(0, len(names), batch_size):
            stop = min(start + batch_size, len(names))
            yield list(names[start:stop]), predictor.preparation.items([items[row] for row in range(start, stop)])

    return Inputs(len(names), batches())


def _table(predictor: Predictor, path: Path, batch_size: int) -> Inputs:
    """Rows are called by their number, from 1."""
    columns = predictor.preparation.columns
    pictures = isinstance(predictor.preparation, Pictures)
    if pictures and path.suffix.lower() == ".parquet":
        columns = (predictor.preparation.data.image_column,)
    elif not columns:
        _check_takes(predictor, path, Texts, LabelledTexts, ListOps)
    readers = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    found, rows = readers[path.suffix.lower()](path)
    for column in columns:
        if column not in found:
            raise DataError(f"{path}: {unknown(column, found, 'a column')}")
    if pictures:
        import datasets

        rows = rows.cast_column(columns[0], datasets.Image(decode=False))
    names = [str(number) for number in range(1, len(rows) + 1)]
    return _listed(predictor, names, _Rows(rows, columns, path, texts=not pictures), batch_size, path)


class _Rows(Sequence):
    """Rows of a table as raw inputs."""

    def __init__(self, rows: Any, columns: tuple[str, ...], path: Path, *, texts: bool):
        self.rows, self.columns, self.path, self.texts = rows, columns, path, texts

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        values = tuple(self.rows[row].get(column) for column in self.columns)
        wrong = str if self.texts else dict
        if not all(isinstance(value, wrong) for value in values):
            what = "text" if self.texts else "image"
            raise DataError(f"{self.path}: row {row + 1} holds no {what} in {' and '.join(self.columns)}.")
        return values[0] if len(values) == 1 else values


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({str(error).rstrip('.')}).") from None


def _csv(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(_text(path).splitlines(keepends=True))
    try:
        return list(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as csv ({error}).") from None


def _jsonl(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number}, is no JSON ({error}).") from None
        if not isinstance(rows[-1], dict):
            raise DataError(f"{path}, line {number}, is no JSON object: expected one a line.")
    return list(dict.fromkeys(column for row in rows for column in row)), rows


def _parquet(path: Path) -> tuple[list[str], Any]:
    import datasets
    from pyarrow.parquet import read_schema

    try:
        read_schema(path)  # `datasets` logs what it trips over, too
        found = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # whatever they trip over in a stranger's file
        raise DataError(f"{path} cannot be read as parquet ({(str(error).splitlines() or ['?'])[0].rstrip('.')}).") from None
    return found.column_names, found


def _arrays(predictor: Predictor, path: Path, batch_size: int) -> Inputs:
    """Inputs are called by their number, from 0."""
    try:
        found = np.load(path, allow_pickle=False, mmap_mode="r")
        arrays = {"inputs": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except Exception as error:  # zipfile, zlib and numpy have errors of their own
        raise DataError(f"{path} cannot be read as arrays of numpy's ({(str(error).splitlines() or ['?'])[0].rstrip('.')}).") from None
    if "inputs" not in arrays:
        raise DataError(f"{path} holds {', '.join(arrays) or 'nothing'}: expected inputs, and perhaps {' and '.join(FURTHER)}.")
    if any(array.dtype.kind not in "iufb" or not array.size or not array.ndim for array in arrays.values()):
        raise DataError(f"{path} holds an array that is empty, or of no numbers.")
    if arrays["inputs"].dtype.kind == "u":  # torch has few operations on unsigned integers beyond bytes
        arrays["inputs"] = arrays["inputs"].astype(np.uint8 if arrays["inputs"].dtype == np.uint8 else np.int64)
    total = 1 if predictor.preparation.is_one(arrays["inputs"]) else len(arrays["inputs"])
    return Inputs(total, _numbered(predictor.batches(arrays, batch_size), ""))


def _split(predictor: Predictor, path: Path, split: str, batch_size: int) -> Inputs:
    """A split of a data set, read as the run read its own, in its order."""
    if split not in SPLITS:
        raise DataError(unknown(split, SPLITS, "a split"))
    settings = predictor.trained.settings
    if settings is None:
        raise DataError(f"{path} holds no images, and {predictor.path} does not say how its data are read: give arrays (.npy, .npz).")
    from lba_exp import build

    cfg = OmegaConf.create(settings)
    cfg.data.source, cfg.data.eval_batch_size = str(path), batch_size
    if isinstance(predictor.preparation, LabelledTexts):
        cfg.data.bucket_steps = 0  # in the order of the rows
    if isinstance(predictor.preparation, Texts | LabelledTexts):
        file = file_of(predictor.preparation)
        if file is not None:
            cfg.data.vocabulary, cfg.data.vocabulary_size = str(file), None
    data = build.data_module(cfg)
    if predictor.trained.kept:
        data.adopt(predictor.trained.kept)
    return Inputs(data.spec.sizes[split], _numbered(data.split_loader(split), f"{split}/"))


def _numbered(batches: Iterable[Batch], prefix: str) -> Iterator[tuple[list[str], Batch]]:
    number = 0
    for batch in batches:
        yield [f"{prefix}{number + row}" for row in range(len(batch["inputs"]))], batch
        number += len(batch["inputs"])
