"""Rows of numbers, one a token, that need not fit into memory: what a stream reads, and what it keeps between two passes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lba_exp.errors import DataError

NUMPY = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


class Tape:
    """``length`` rows of ``width`` numbers each, written and read in blocks, in memory.

    Args:
        dtype: of the rows.
    """

    def __init__(self, length: int, width: int, dtype: torch.dtype):
        self._rows = torch.empty(length, width, dtype=dtype)

    def write(self, start: int, rows: Tensor) -> None:
        """Rows (n, width) from ``start`` on."""
        self._rows[start : start + len(rows)] = rows

    def read(self, start: int, stop: int) -> Tensor:
        """(stop - start, width), on the CPU."""
        return self._rows[start:stop].clone()  # a stream writes the next layer's rows into the same tape


class FileTape:
    """The same in a temporary file; a block is mapped into memory while it is read or written, and no longer.

    Args:
        folder: where the file is; it has no name, and is gone with the process.

    Raises:
        DataError: the folder cannot hold it.
    """

    def __init__(self, length: int, width: int, dtype: torch.dtype, folder: Path):
        self.width, self.dtype = width, np.dtype(NUMPY.get(dtype, np.float32))  # numpy has no bfloat16
        self._torch = dtype
        size = length * width * self.dtype.itemsize
        try:
            self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the tape)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)  # a full disk is met here, and not in the midst of a mapped block
            else:
                self._file.truncate(size)
        except OSError as error:
            raise DataError(f"{folder} cannot hold a temporary file of {size:,} bytes ({error.strerror}): give another folder.") from None

    def _block(self, start: int, count: int, mode: str) -> np.memmap:
        offset = start * self.width * self.dtype.itemsize
        return np.memmap(self._file, self.dtype, mode, offset, (count, self.width))

    def write(self, start: int, rows: Tensor) -> None:
        if rows.numel():
            block = self._block(start, len(rows), "r+")
            block[:] = rows.to("cpu", torch.from_numpy(np.empty(0, self.dtype)).dtype).numpy()

    def read(self, start: int, stop: int) -> Tensor:
        if stop <= start or not self.width:
            return torch.empty(max(0, stop - start), self.width, dtype=self._torch)
        return torch.from_numpy(np.array(self._block(start, stop - start, "r"))).to(self._torch)


def tapes(folder: Path | None) -> Callable[[int, int, torch.dtype], Tape | FileTape]:
    """What makes tapes: (length, width, dtype) -> one in memory, or, where a folder is given, in a file there."""
    return Tape if folder is None else lambda length, width, dtype: FileTape(length, width, dtype, folder)


class Source:
    """One sequence as numbers, read in blocks: an array in memory, or a .npy file, mapped anew for each block and no longer than that.

    Args:
        data: (L, ...) array or tensor, or the path of a .npy file that holds one.

    Attributes:
        name: the file's, or "the sequence".
        shape, dtype: of the array.

    Raises:
        DataError: no such file, or no array of plain numbers in it.
    """

    def __init__(self, data: str | Path | np.ndarray | Tensor):
        self._path: Path | None = None
        if isinstance(data, Tensor):
            data = data.detach().cpu().numpy()
        if isinstance(data, np.ndarray):
            self.name, self._array = "the sequence", data
        else:
            self.name, self._path = str(data), Path(data).expanduser()
        found = self._open()
        self.shape, self.dtype = found.shape, found.dtype
        if self.dtype.kind not in "iuf" or not found.size:
            what = f"{self.dtype} of shape {self.shape}"
            raise DataError(f"{self.name} holds {what}: expected some integers or floating-point numbers.")

    def read(self, *index: slice) -> np.ndarray:
        """A part of the array, in memory."""
        return np.array(self._open()[index])

    def _open(self) -> np.ndarray:
        return self._array if self._path is None else mapped(self._path)


def mapped(path: Path) -> np.memmap:
    """The array of a .npy file, mapped into memory; raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a .npy file.")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an array of numpy's ({str(error).splitlines()[0].rstrip('.')}).") from None
    if not isinstance(found, np.memmap):
        raise DataError(f"{path} holds several arrays: a stream reads one, of a .npy file.")
    return found
