"""Images as uint8 arrays: decoded once into memory or one by one, checked, shifted."""

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
    """The images of one split, decoded when asked for: ``images[row]`` is uint8 (height, width), of colours (height, width, 3).

    Args:
        dataset: a ``datasets.Dataset`` with the column ``column`` of images (of any mode; files, or their bytes).
        size: resize to (size, size) pixels; None: as they are, all of one size.
        where: what to call the split in messages.
        mode: Pillow's name of what they are turned into: "L" (grey) or "RGB".
        mixed: they may be of several sizes.
        padded_size: then put in the middle of (padded_size, padded_size) pixels, 0 around (a row or column more behind than before, where
            it cannot be the very middle); None: as they are.

    Raises:
        DataError: at once: no such column, or it holds no images; on access: an image that is missing, unreadable,
            of more than 8 bits a channel, of another size than the first, or larger than ``padded_size``.
    """

    def __init__(
        self,
        dataset: Any,
        column: str,
        size: int | None,
        where: str,
        *,
        mode: str = "L",
        mixed: bool = False,
        padded_size: int | None = None,
    ):
        import datasets

        check_column(dataset, column, "image_column", where)
        feature = dataset.features[column]
        encoded = isinstance(feature, Mapping) and {"bytes", "path"} <= feature.keys()  # parquet written without features
        if not (isinstance(feature, datasets.Image) or encoded or getattr(feature, "dtype", None) in ("binary", "large_binary")):
            kind = getattr(feature, "dtype", None) or type(feature).__name__
            raise DataError(f"{where}: the column {column!r} (data.image_column) holds {kind}, not images.")
        self.rows = dataset.select_columns(column).with_format(None).cast_column(column, datasets.Image(decode=False))
        self._decoder = datasets.Image()
        self.column, self.size, self.where, self.mode, self.padded_size = column, size, where, mode, padded_size
        self.shape: tuple[int, ...] | None = None
        if not mixed:
            self.shape = self[0].shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._decode(self.rows[int(row)][self.column], int(row))

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), _BLOCK):
            for row, value in enumerate(self.rows[start : start + _BLOCK][self.column], start):
                yield self._decode(value, row)

    def _decode(self, value: Mapping[str, Any] | None, row: int) -> np.ndarray:
        which = f"{self.where}: image {row}" + (f" ({value['path']})" if value and value.get("path") else "")
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise DataError(f"{which} is missing.")
        try:
            image = self._decoder.decode_example(value)
        except Exception as error:  # Pillow raises errors of many kinds for broken files
            raise DataError(f"{which} cannot be read as an image.") from error
        if deep(image):
            raise DataError(f"{which} has more than 8 bits a channel (mode {image.mode}): convert the images to 8 bits.")
        image = image.convert(self.mode)
        if self.size is not None and image.size != (self.size, self.size):
            image = image.resize((self.size, self.size))
        if (padded := self.padded_size) is not None:
            if max(image.size) > padded:
                raise DataError(f"{which} has {image.width} x {image.height} pixels, more than data.padded_size={padded} each way.")
            left, top = ((padded - length) // 2 for length in image.size)
            image = image.crop((-left, -top, padded - left, padded - top))  # Pillow gives 0 for what lies outside
        pixels = np.asarray(image)
        if self.shape not in (None, pixels.shape):
            raise DataError(
                f"{which} has {_by(pixels.shape)} pixels and the first one {_by(self.shape)}: set data.size to resize all to one size."
            )
        return pixels


def _by(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"


def decode(images: Mapping[str, Images], *, show: bool = True) -> dict[str, np.ndarray]:
    """Every image of every split, all of one size: split -> uint8 (n, height, width[, 3]); a progress bar where there are many."""
    decoded = {split: np.empty((len(found), *found.shape), np.uint8) for split, found in images.items()}
    for split, row, pixels in _each(images, show):
        decoded[split][row] = pixels
    return decoded


def decode_mixed(images: Mapping[str, Images], limit: int, *, show: bool = True) -> dict[str, list[np.ndarray]] | None:
    """Every image of every split, of any size: split -> list of uint8 (height, width[, 3]); None: they have more than ``limit`` bytes."""
    first = next(iter(next(iter(images.values()))))
    if first.nbytes * sum(map(len, images.values())) > 4 * limit:  # a hopeless case is not tried
        return None
    decoded: dict[str, list[np.ndarray]] = {split: [] for split in images}
    for split, _, pixels in _each(images, show):
        decoded[split].append(pixels)
        limit -= pixels.nbytes
        if limit < 0:
            return None
    return decoded


def _each(images: Mapping[str, Images], show: bool) -> Iterator[tuple[str, int, np.ndarray]]:
    """(split, row, pixels) of all images."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(len(found) for found in images.values())
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not show or total <= MANY_IMAGES) as progress:
        task = progress.add_task("", total=total)
        for split, found in images.items():
            for row, pixels in enumerate(found):
                yield split, row, pixels
                if row % _BLOCK == 0:
                    progress.update(task, advance=_BLOCK)


def readable(dataset: Any, column: str, where: str, workers: int) -> tuple[Any, list[str]]:
    """The rows of a split whose image can be read, and a name of each that cannot.

    Every image is decoded once, by ``workers`` processes; ``datasets`` keeps the answer in its cache. Arguments as of ``Images``.

    Raises:
        DataError: no such column, or none of the images can be read.
    """
    images = Images(dataset, column, None, where, mixed=True)
    checked = images.rows.map(_Readable(column), remove_columns=column, num_proc=workers or None, desc=f"reading images of {where}")
    said = checked.with_format(None)["unreadable"][:]
    rows = [row for row, why in enumerate(said) if not why]
    if not rows:
        raise DataError(f"{where}: none of its {len(said)} images can be read ({said[0]}).")
    names = [f"image {row}{' (' + why + ')' if why != '-' else ''}" for row, why in enumerate(said) if why]
    return (dataset if len(rows) == len(said) else dataset.select(rows)), names


class _Readable:
    """Row -> {"unreadable": ""}, or with its path, or "-" where it has none."""

    def __init__(self, column: str):
        self.column = column

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        import datasets

        value = row[self.column]
        try:
            image = datasets.Image().decode_example(value)
            image.convert("L")
            wrong = deep(image)
        except Exception:  # Pillow raises errors of many kinds for broken files; None: no image at all
            wrong = True
        return {"unreadable": ((value or {}).get("path") or "-") if wrong else ""}


def deep(image: Any) -> bool:
    """Whether a Pillow image has more than 8 bits a channel."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def statistics(images: Any, rows: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the pixels of some rows, with pixels in 0..1; the deviation of constant images counts as 1."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        pixels = images[block] if isinstance(images, np.ndarray) else np.stack([images[row] for row in block])
        counts += np.bincount(pixels.reshape(-1), minlength=256)
    return _moments(counts)


def channel_statistics(images: Any, rows: np.ndarray) -> tuple[list[float], list[float]]:
    """As ``statistics``, for each channel of images of any sizes."""
    counts: list[Any] = []
    for row in rows:
        pixels = images[row]
        pixels = pixels.reshape(-1, 1 if pixels.ndim == 2 else pixels.shape[-1])
        counts = counts or [0] * pixels.shape[1]
        counts = [count + np.bincount(pixels[:, channel], minlength=256) for channel, count in enumerate(counts)]
    found = [_moments(count) for count in counts]
    return [mean for mean, _ in found], [deviation for _, deviation in found]


def _moments(counts: np.ndarray) -> tuple[float, float]:
    values = np.arange(256) / 255
    mean = float((counts * values).sum() / counts.sum())
    return mean, float(np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())) or 1.0


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
