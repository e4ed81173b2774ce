"""Images as grey uint8 arrays: decoded once into memory or one by one, checked, shifted, and made into sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lba_exp.data.reading import check_column
from lba_exp.errors import DataError

MEMORY_LIMIT = 2 * 2**30  # bytes of pixels that are kept decoded
MANY_IMAGES = 5_000  # from here on decoding shows a progress bar
STATISTICS_SAMPLE = 10_000  # images of the training split that give mean and deviation where not all are decoded
_BLOCK = 1_000


class Images:
    """The images of one split, decoded when asked for: ``images[row]`` is uint8 (height, width).

    Args:
        dataset: a ``datasets.Dataset`` with the column ``column`` of images (of any mode; files, or their bytes).
        size: resize to (size, size) pixels; None: as they are, all of one size.
        where: what to call the split in messages.
        padded_size: then put in the middle of (padded_size, padded_size) pixels, 0 around (a row or column more behind than before, where
            it cannot be the very middle); None: as they are.

    Raises:
        DataError: at once: no such column, or it holds no images; on access: an image that is missing, unreadable,
            of more than 8 bits a channel, of another size than the first, or larger than ``padded_size``.
    """

    def __init__(self, dataset: Any, column: str, size: int | None, where: str, padded_size: int | None = None):
        import datasets

        check_column(dataset, column, "image_column", where)
        feature = dataset.features[column]
        encoded = isinstance(feature, Mapping) and {"bytes", "path"} <= feature.keys()  # parquet written without features
        if not (isinstance(feature, datasets.Image) or encoded or getattr(feature, "dtype", None) in ("binary", "large_binary")):
            kind = getattr(feature, "dtype", None) or type(feature).__name__
            raise DataError(f"{where}: the column {column!r} (data.image_column) holds {kind}, not images.")
        self._rows = dataset.select_columns(column).with_format(None).cast_column(column, datasets.Image(decode=False))
        self._decoder = datasets.Image()
        self.column, self.size, self.where, self.padded_size = column, size, where, padded_size
        self.shape: tuple[int, int] | None = None
        self.shape = self[0].shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._decode(self._rows[int(row)][self.column], int(row))

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), _BLOCK):
            for row, value in enumerate(self._rows[start : start + _BLOCK][self.column], start):
                yield self._decode(value, row)

    def _decode(self, value: Mapping[str, Any] | None, row: int) -> np.ndarray:
        which = f"{self.where}: image {row}" + (f" ({value['path']})" if value and value.get("path") else "")
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise DataError(f"{which} is missing.")
        try:
            image = self._decoder.decode_example(value)
        except Exception as error:  # Pillow raises errors of many kinds for broken files
            raise DataError(f"{which} cannot be read as an image.") from error
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise DataError(f"{which} has more than 8 bits a channel (mode {image.mode}): convert the images to 8 bits.")
        grey = image.convert("L")
        if self.size is not None and grey.size != (self.size, self.size):
            grey = grey.resize((self.size, self.size))
        pixels = np.asarray(grey)
        if self.padded_size is not None:
            if max(pixels.shape) > self.padded_size:
                raise DataError(f"{which} has {_by(pixels.shape)} pixels, more than data.padded_size={self.padded_size} each way.")
            room = [(self.padded_size - length) // 2 for length in pixels.shape]
            around = [(before, self.padded_size - length - before) for before, length in zip(room, pixels.shape, strict=True)]
            pixels = np.pad(pixels, around)
        if self.shape not in (None, pixels.shape):
            raise DataError(
                f"{which} has {_by(pixels.shape)} pixels and the first one {_by(self.shape)}: set data.size to resize all to one size."
            )
        return pixels


def _by(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"


def decode(images: Mapping[str, Images], *, show: bool = True) -> dict[str, np.ndarray]:
    """Every image of every split: split -> uint8 (n, height, width); with a progress bar where there are many."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(len(found) for found in images.values())
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    decoded = {}
    with Progress(*columns, transient=True, disable=not show or total <= MANY_IMAGES) as progress:
        task = progress.add_task("", total=total)
        for split, found in images.items():
            decoded[split] = np.empty((len(found), *found.shape), np.uint8)
            for row, pixels in enumerate(found):
                decoded[split][row] = pixels
                if row % _BLOCK == 0:
                    progress.update(task, advance=_BLOCK)
    return decoded


def statistics(images: Any, rows: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the pixels of some rows, with pixels in 0..1; the deviation of constant images counts as 1."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        pixels = images[block] if isinstance(images, np.ndarray) else np.stack([images[row] for row in block])
        counts += np.bincount(pixels.reshape(-1), minlength=256)
    values = np.arange(256) / 255
    mean = float((counts * values).sum() / counts.sum())
    deviation = float(np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum()))
    return mean, deviation or 1.0


def shift(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image moved by -1, 0 or 1 pixels down and to the right, each drawn from ``rng``; what comes in at the edge is 0."""
    height, width = pixels.shape
    down, right = int(rng.integers(3)) - 1, int(rng.integers(3)) - 1
    moved = np.zeros_like(pixels)
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = pixels[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return moved


AUGMENTATIONS = {"none": None, "shift": shift}
