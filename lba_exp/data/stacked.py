"""Images of one size, taken from one array a whole batch at a time: what torchvision does image by image, some fifteen times as fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from lba_exp.data.augmentation import ERASED_AREA, ERASED_RATIO, evaluation_transform

_TRIES = 10  # at a box that is smaller than the image; after that nothing is erased, as in torchvision


class Stacked:
    """Samples of one split, batch by batch: ``{"inputs": (B, channels, height, width) float32, "labels": (B,) int64}``.

    Args:
        images: uint8 (n, height, width[, 3]), of the source's split.
        labels: int64 (n,), of the samples.
        rows: int64 (n,), where the samples' images are.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray):
        self.images, self.labels, self.rows = images, labels, rows
        self._table = np.zeros((1, 256), np.float32)

    def normalise(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        """What becomes of the 256 values of a pixel, in each channel: by torchvision, so that both ways give the same bits."""
        values = np.arange(256, dtype=np.uint8)[None]
        values = values if len(mean) == 1 else np.repeat(values[..., None], len(mean), axis=2)
        self._table = evaluation_transform((1, 256), None, mean, deviation)(Image.fromarray(values)).numpy()[:, 0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return single(self.batch([index]))

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The samples at ``indices``."""
        return self.look_up(self.images[self.rows[indices]], indices)

    def look_up(self, pixels: np.ndarray, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Pixels, uint8 (B, height, width[, 3]), of the samples at ``indices``, as a batch."""
        channels = [pixels] if pixels.ndim == 3 else np.moveaxis(pixels, 3, 0)
        inputs = np.stack([table.take(channel) for table, channel in zip(self._table, channels, strict=True)], axis=1)
        return {"inputs": torch.from_numpy(inputs), "labels": torch.from_numpy(self.labels[indices].astype(np.int64))}


class StackedCrops:
    """The same with padded crops, flips and erased boxes, drawn for each sample from its own generator; distributed as torchvision's are.

    Args:
        samples: that are augmented.
        settings: of ``AugmentationSchema``, such that ``fits(settings)``.
    """

    def __init__(self, samples: Stacked, settings: Mapping[str, Any]):
        self.samples = samples
        self.padding = settings["crop_padding"] if settings["crop"] == "padded" else 0
        self.flip, self.erasing = settings["flip"], settings["erasing"]

    @staticmethod
    def fits(settings: Mapping[str, Any]) -> bool:
        """Whether these are all that the settings ask for."""
        return settings["crop"] != "resized" and not settings["rand_augment"] and not settings["colour_jitter"]

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, index: int, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
        return single(self.draw_batch([index], [rng]))

    def draw_batch(self, indices: Sequence[int], rngs: Sequence[np.random.Generator]) -> dict[str, torch.Tensor]:
        """The samples at ``indices``, each by draws from its own of ``rngs``."""
        pixels = self.samples.images[self.samples.rows[indices]]
        down, right, flip, erase = np.stack([rng.random(4) for rng in rngs], axis=1)
        sides = 2 * self.padding + 1
        batch = self.samples.look_up(self.moved(pixels, (down * sides).astype(int), (right * sides).astype(int), flip < self.flip), indices)
        inputs = batch["inputs"].numpy()
        for i in np.flatnonzero(erase < self.erasing):
            erase_box(inputs[i], rngs[i])
        return batch

    def moved(self, pixels: np.ndarray, down: np.ndarray, right: np.ndarray, flip: np.ndarray) -> np.ndarray:
        """Crops of bordered images, uint8 (B, height, width[, 3]).

        Args:
            pixels: uint8 (B, height, width[, 3]); the border is 0.
            down, right: int (B,), the corner of each crop, 0 to twice the border.
            flip: bool (B,), left for right after the crop.
        """
        p, (height, width) = self.padding, pixels.shape[1:3]
        if p:
            pixels = np.pad(pixels, ((0, 0), (p, p), (p, p)) + ((0, 0),) * (pixels.ndim - 3))
        columns = np.where(flip[:, None], np.arange(width)[::-1], np.arange(width)) + right[:, None]
        rows = np.arange(height) + down[:, None]
        return pixels[np.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]


def single(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The only sample of a batch: (float32 (channels, height, width), label)."""
    return batch["inputs"][0], int(batch["labels"][0])


def erase_box(image: np.ndarray, rng: np.random.Generator) -> None:
    """A box of a normalised image becomes normal noise, in place: its area and shape are drawn as in arXiv 1708.04896.

    Args:
        image: float32 (channels, height, width).
    """
    channels, height, width = image.shape
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*ERASED_AREA)
        ratio = math.exp(rng.uniform(*np.log(ERASED_RATIO)))
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if tall < height and wide < width:
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            image[:, top : top + tall, left : left + wide] = rng.standard_normal((channels, tall, wide), np.float32)
            return
