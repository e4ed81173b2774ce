"""Predictions on their way into a new file: csv, jsonl or npz, whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lba_exp.errors import UserError
from lba_exp.inference.predictor import TOP, Guess, Prediction
from lba_exp.results.folder import finite


class Rows:
    """Rows of predictions in a csv or jsonl file, which appears under its name once it is whole.

    csv: name, class and the probability of each class; or name, position, token and its probability from the first to the ``top``-th; or
    name and value. jsonl: the same under "name", "class", "probabilities", "position", "tokens", "value".

    Args:
        path: a new file.
        class_names: of the classes.
        number: a number is predicted.
        per_token: rows hold tokens.
        top: tokens a row.
    """

    def __init__(self, path: Path, class_names: Sequence[str], *, number: bool = False, per_token: bool = False, top: int = TOP):
        self.path, self.class_names, self.number, self.top = path, list(class_names), number, top
        self._json = path.suffix == ".jsonl"
        try:
            self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115 (closed by close or abandon)
                "w", dir=path.absolute().parent, prefix=f".{path.name}.", suffix=".part", newline="", encoding="utf-8", delete=False
            )
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}).") from None
        self._csv = csv.writer(self._file, lineterminator="\n")
        if not self._json:
            if per_token:
                header = ["position", *(cell for n in range(1, top + 1) for cell in (f"token_{n}", f"probability_{n}"))]
            else:
                header = ["value"] if number else ["class", *(f"probability_{name}" for name in self.class_names)]
            self._csv.writerow(["name", *header])

    def add(self, names: Sequence[str], prediction: Prediction) -> None:
        """One row an input."""
        if self.number:
            for name, value in zip(names, prediction.logits[:, 0].tolist(), strict=True):
                self._row({"name": name, "value": value}, [name, f"{value:.9g}"])
            return
        for name, label, row in zip(names, prediction.labels, prediction.probabilities.tolist(), strict=True):
            probabilities = dict(zip(self.class_names, row, strict=True))
            self._row({"name": name, "class": label, "probabilities": probabilities}, [name, label, *(f"{p:.9g}" for p in row)])

    def add_guesses(self, names: Sequence[str], guesses: Sequence[Sequence[Guess]]) -> None:
        """One row a position that is predicted."""
        for name, found in zip(names, guesses, strict=True):
            for guess in found:
                tokens = [{"token": token, "probability": p} for token, p in guess.tokens]
                cells = [cell for token, p in guess.tokens for cell in (token, f"{p:.9g}")]
                self._row({"name": name, "position": guess.position, "tokens": tokens}, [name, guess.position, *cells])

    def _row(self, whole: dict[str, Any], cells: list[Any]) -> None:
        if self._json:
            self._file.write(json.dumps(finite(whole), ensure_ascii=False, allow_nan=False) + "\n")
        else:
            self._csv.writerow(cells)

    def close(self) -> None:
        """Gives the file its name; raises UserError where that came to exist meanwhile."""
        self._file.close()
        publish(Path(self._file.name), self.path)

    def abandon(self) -> None:
        """Leaves nothing behind."""
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)


class Arrays:
    """Predictions in an npz file, which appears under its name once it is whole; what is added lies on disk until then.

    Of classifiers: ``names`` (N,), ``logits`` and ``probabilities`` (N, classes), ``classes`` (N,), ``class_names``; of numbers ``values``
    (N,). Of language models: ``names`` and ``lengths`` (N,), ``logits`` (sum of lengths, vocabulary), ``tokens`` (sum of lengths,), both
    one input after the other, without padding.

    Args:
        path: a new file.
        class_names: of the classes.
    """

    def __init__(self, path: Path, class_names: Sequence[str]):
        self.path, self.class_names = path, list(class_names)
        self._names: list[str] = []
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent))
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}).") from None
        self._columns: dict[str, tuple[Any, np.dtype, tuple[int, ...], int]] = {}

    def add(self, names: Sequence[str], prediction: Prediction, tokens: Tensor | None = None) -> None:
        """Inputs by their names; ``tokens`` (N, L) of a language model's inputs."""
        self._names += names
        if prediction.number:
            self.append("values", prediction.logits[:, 0])
        elif prediction.padding_mask is None:
            self.append("logits", prediction.logits)
            self.append("probabilities", prediction.probabilities)
            self.append("classes", prediction.classes)
        else:
            mask = prediction.padding_mask
            self.append("lengths", mask.sum(1))
            self.append("logits", prediction.logits[mask])
            self.append("tokens", tokens[mask])

    def add_name(self, name: str) -> None:
        """The name of an input whose arrays are appended by themselves."""
        self._names.append(name)

    def append(self, name: str, rows: Tensor | np.ndarray) -> None:
        """Adds rows to one of the arrays."""
        rows = np.ascontiguousarray(rows.numpy() if isinstance(rows, Tensor) else rows)
        try:
            if name not in self._columns:
                self._columns[name] = (open(self._folder / name, "wb"), rows.dtype, rows.shape[1:], 0)  # noqa: SIM115 (closed by close or abandon)
            file, dtype, shape, count = self._columns[name]
            file.write(rows.astype(dtype, copy=False).tobytes())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}).") from None
        self._columns[name] = (file, dtype, shape, count + len(rows))

    def close(self) -> None:
        """Puts the file together and gives it its name; raises UserError where that came to exist meanwhile, or the disk is full."""
        whole = self._folder / "whole.npz"
        try:
            with zipfile.ZipFile(whole, "w") as archive:
                for name, (file, dtype, shape, count) in self._columns.items():
                    file.close()
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry, open(self._folder / name, "rb") as rows:
                        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count, *shape)}
                        np.lib.format.write_array_header_1_0(entry, header)
                        shutil.copyfileobj(rows, entry, 2**20)
                    (self._folder / name).unlink()
                for name, words in (("names", self._names), ("class_names", self.class_names)):
                    with archive.open(f"{name}.npy", "w") as entry:
                        np.lib.format.write_array(entry, np.asarray(words, dtype=np.str_), allow_pickle=False)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}).") from None
        publish(whole, self.path)
        self._folder.rmdir()

    def abandon(self) -> None:
        """Leaves nothing behind."""
        for file, *_ in self._columns.values():
            file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def publish(part: Path, path: Path) -> None:
    """Gives a finished file its name, unless a file of that name exists: UserError then."""
    part.chmod(0o666 & ~_umask())  # a temporary file is for its owner alone
    try:
        os.link(part, path)
    except FileExistsError:
        raise UserError(f"{path} exists already: give another --output.") from None
    except OSError:  # a file system without second names
        if path.exists():
            raise UserError(f"{path} exists already: give another --output.") from None
        os.replace(part, path)
    part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
