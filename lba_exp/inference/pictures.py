"""Images on their way into a model: read, resized and normalised as the run did, whose code does it here too."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lba_exp.errors import DataError
from lba_exp.inference.loading import Trained
from lba_exp.inference.preparing import Batch, Preparation


class Pictures(Preparation):
    """Images, as paths, Pillow's, uint8 arrays (height, width[, 3]) or {"path", "bytes"}; of pixel sequences and of whole images."""

    raw = "images"

    def __init__(self, trained: Trained, vocabulary: str | Path | None = None):
        super().__init__(trained, vocabulary)
        if not {"mean", "deviation"} <= self.kept.keys():
            raise DataError(f"{self.path} keeps no mean and deviation of its images: it was written by another version.")
        self.whole = self.data.kind == "image_classification"

    @cached_property
    def _collate(self) -> Any:
        from lba_exp.data.augmentation import evaluation_transform
        from lba_exp.data.images import Normalise

        mean, deviation = self.kept["mean"], self.kept["deviation"]
        if not self.whole:
            return Normalise(mean, deviation, self.data.layout)
        return evaluation_transform(tuple(self.config["image_size"]), self.data.eval_resize, list(mean), list(deviation))

    def values(self, pixels: np.ndarray) -> np.ndarray:
        if self.whole:
            return super().values(pixels)
        if pixels.dtype != np.uint8:
            raise DataError(f"the model in {self.path} takes pixels (uint8), or normalised values, and these are {pixels.dtype}.")
        return ((pixels / 255 - self.kept["mean"]) / self.kept["deviation"]).astype(np.float32)

    def arrays(self, array: np.ndarray | Tensor, **further: np.ndarray | Tensor) -> Batch:
        """As for every model; uint8 is one picture, (height, width) or (height, width, 3), or a batch of them."""
        if not _is_pixels(array):
            return super().arrays(array, **further)
        return self.items([np.asarray(picture) for picture in (array[None] if self.is_one(array) else array)])

    def is_one(self, array: np.ndarray | Tensor) -> bool:
        if not _is_pixels(array):
            return super().is_one(array)
        return array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))

    def items(self, found: Sequence[Any]) -> Batch:
        import datasets
        from PIL import Image

        from lba_exp.data.image_classification import MODES
        from lba_exp.data.pixels import Images

        rows = [self._encoded(item, number) for number, item in enumerate(found)]
        table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features(image=datasets.Image()))
        options = {"mode": MODES[self.data.channels]} if self.whole else {"padded_size": self.data.padded_size}
        decoded = list(Images(table, "image", None if self.whole else self.data.size, "the input", mixed=True, **options))
        for number, pixels in enumerate(decoded):
            self._check_shape(pixels, rows[number]["path"] or f"image {number}")
        if self.whole:
            return {"inputs": torch.stack([self._collate(Image.fromarray(pixels)) for pixels in decoded])}
        return {"inputs": self._collate([(pixels, 0) for pixels in decoded])["inputs"]}

    def _check_shape(self, pixels: np.ndarray, name: str) -> None:
        height, width = pixels.shape[:2]
        size = self.config.get("image_size")
        if self.whole and self.data.size is not None:
            return  # resized, whatever it is
        if size is not None and (height, width) != tuple(size):
            raise DataError(f"{name} has {width} x {height} pixels, and this model reads {size[1]} x {size[0]}.")
        length = self.config.get("length")
        if size is None and length is not None and height * width != length:
            raise DataError(f"{name} has {width} x {height} pixels, and this model reads images of {length} pixels in all.")

    def _encoded(self, item: Any, number: int) -> dict[str, Any]:
        from PIL import Image

        if isinstance(item, str | Path):
            if not Path(item).is_file():
                raise DataError(f"{item} does not exist: give an image file.")
            return {"path": str(item), "bytes": None}
        if isinstance(item, Mapping) and {"path", "bytes"} <= item.keys():
            return {"path": item["path"], "bytes": item["bytes"]}
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim in (2, 3):
            item = Image.fromarray(item.squeeze(-1) if item.shape[-1] == 1 else item)
        if not isinstance(item, Image.Image):
            super().items([item])
        buffer = io.BytesIO()
        try:
            item.save(buffer, "PNG")  # nothing is lost
        except OSError:
            raise DataError(f"image {number} has the mode {item.mode}: convert it to RGB or to grey of 8 bits.") from None
        return {"path": None, "bytes": buffer.getvalue()}

    def _values_words(self) -> str:
        return "give pictures (uint8), or floating-point values that are normalised already"


def _is_pixels(array: np.ndarray | Tensor) -> bool:
    return str(array.dtype).endswith("uint8")
