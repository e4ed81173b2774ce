"""Images with a class each, whole, in colour or grey: a folder, parquet files or a data set of the hub; with augmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from lba_exp.data.augmentation import evaluation_transform, training_transform
from lba_exp.data.base import SplitData
from lba_exp.data.labels import SPLITS, check_classes, cut_splits, read_labels
from lba_exp.data.pixels import MEMORY_LIMIT, STATISTICS_SAMPLE, Images, channel_statistics, decode_mixed
from lba_exp.data.reading import drop_unreadable, pick_splits, read_all
from lba_exp.data.sources import resolve_source
from lba_exp.data.spec import DataSpec
from lba_exp.data.stacked import Stacked, StackedCrops
from lba_exp.errors import DataError

MODES = {1: "L", 3: "RGB"}


class ImageClassification(SplitData):
    """Classification of whole images, for models that cut patches.

    A batch is ``{"inputs": (B, channels, height, width) float32, "labels": (B,) int64}``; mean and deviation of each channel are taken off.
    Training batches come shuffled from a ``ResumableLoader`` and augmented as ``augmentation`` says, each sample by draws of its own in
    each epoch; evaluation takes the middle of each image, and gives each sample exactly once over all devices. Images are decoded once into
    memory, or, beyond 2 GiB of pixels, when asked for. Those in memory that are of one size already are taken batch by batch
    (``lba_exp.data.stacked``).

    Args:
        source: "digits", a local folder (train.parquet and test.parquet, one written by ``save_to_disk``, or images as
            train/CLASS/*.jpg, val/CLASS/*.jpg), or a hub name, "org/name" or "org/name:config".
        name: what the data set is called; None: from ``source``.
        image_column, label_column: where images and labels are; labels are ClassLabel, integers 0..n-1 or strings.
        train_split, validation_split, test_split: the source's own names of these splits; None: the usual ones. Two may be the same.
        channels: 3 (RGB) or 1 (grey).
        size: height and width of what the model gets; None: images are all of one size, and stay as they are.
        eval_resize: the shorter side in pixels, of which evaluation takes the middle; None: as ``size``.
        channel_mean, channel_deviation: in place of the training split's own, for pixels in 0..1; one number a channel.
        classes: how many there have to be; None: any number.
        unreadable: "error", or "skip": images that cannot be read are looked for in ``setup``, left out and counted.
        validation_fraction, test_fraction: share of the source's training split that becomes a split which the source lacks, by label.
        split_seed: of those cuts.
        batch_size, eval_batch_size: images a batch on one device, in training and otherwise.
        workers: processes that load; 0: the training process itself.
        seed: of the training order and the augmentation.
        augmentation: settings of ``AugmentationSchema``; None: none. (Mixup and CutMix are the task's: they mix whole batches.)

    Attributes:
        notes: what there is to tell after ``setup``, in sentences.
        skipped: split of the source -> images left out, where there are any.

    Raises:
        DataError: an unknown value; in ``setup``: data that is missing or not as described.
    """

    def __init__(
        self,
        source: str = "digits",
        *,
        name: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = None,
        channels: int = 3,
        size: int | None = None,
        eval_resize: int | None = None,
        channel_mean: Sequence[float] | None = None,
        channel_deviation: Sequence[float] | None = None,
        classes: int | None = None,
        unreadable: str = "error",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        workers: int = 0,
        seed: int = 0,
        augmentation: Mapping[str, Any] | None = None,
    ):
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, workers=workers, seed=seed)
        if channels not in MODES:
            raise DataError(f"data.channels={channels}: give 3 (colours) or 1 (grey).")
        for key, values in (("channel_mean", channel_mean), ("channel_deviation", channel_deviation)):
            if values is not None and len(values) != channels:
                raise DataError(f"data.{key} has {len(values)} numbers, and data.channels={channels}: give one a channel, or null.")
        if size is not None and eval_resize is not None and eval_resize < size:
            raise DataError(f"data.eval_resize={eval_resize} is less than data.size={size}, the part that is taken of it.")
        self.source, self.name, self.image_column, self.label_column = source, name, image_column, label_column
        self.named = {"train": train_split, "validation": validation_split, "test": test_split}
        self.channels, self.size, self.eval_resize, self.classes, self.unreadable = channels, size, eval_resize, classes, unreadable
        self.channel_mean, self.channel_deviation = channel_mean, channel_deviation
        self.fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
        self.split_seed, self.augmentation = split_seed, augmentation
        self.repeats = augmentation["repeats"] if augmentation else 1
        self.notes: list[str] = []
        self.skipped: dict[str, int] = {}
        self._raw: dict[str, Any] | None = None
        self._collate = collate

    def prepare_data(self) -> None:
        """Reads, or downloads, on one process; the others then find it in the cache."""
        if self._splits is None and self._raw is None:
            source = resolve_source(self.source)
            self._raw = pick_splits(read_all(source), source.name, self.named)

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and cuts all splits, once, and decodes them where they fit into memory; raises DataError."""
        if self._splits is not None:
            return
        self.prepare_data()
        source = resolve_source(self.source)
        raw, self._raw = self._raw, None
        if self.unreadable == "skip":
            raw, self.skipped, self.notes = drop_unreadable(raw, self.image_column, source.name, self.workers)
        images = {
            split: Images(
                dataset, self.image_column, None, f"{source.name}, {split} split", mode=MODES[self.channels], mixed=self.size is not None
            )
            for split, dataset in raw.items()
        }
        labels, class_names = read_labels(raw, self.label_column, source.name)
        if self.classes not in (None, len(class_names)):
            raise DataError(
                f"{source.name} has {len(class_names)} classes in column {self.label_column!r}, and data.classes={self.classes}: "
                "give the data of that many classes, or data.classes=null."
            )
        shape = (self.size, self.size) if self.size is not None else images["train"].shape[:2]
        for found in images.values():
            if self.size is None:
                found.shape = images["train"].shape  # so that a split of another size is noticed too
        self._images = decode_mixed(images, MEMORY_LIMIT, show=self.trainer is None or self.trainer.is_global_zero) or images
        as_they_are = self._images is not images and self.eval_resize in (None, min(shape))
        stacked = as_they_are and all(x.shape[:2] == shape for found in self._images.values() for x in found)
        if stacked:
            self._images = {split: np.stack(found) for split, found in self._images.items()}
        cut = cut_splits(labels, **self.fractions, seed=self.split_seed)
        mean, deviation = self._statistics(*cut["train"])
        kind = Stacked if stacked else Pictures
        self._splits = {split: kind(self._images[of], labels[of][rows], rows) for split, (of, rows) in cut.items()}
        self._spec = DataSpec(
            name=self.name or source.name,
            length=shape[0] * shape[1],
            classes=len(class_names),
            class_names=class_names,
            channels=self.channels,
            vocabulary=None,
            sizes={split: len(found) for split, found in self._splits.items()},
            fingerprint="",
            grid=shape,
        )
        self._normalise(mean, deviation)
        self._spec = DataSpec(**{**vars(self._spec), "fingerprint": self._fingerprint()})

    def _statistics(self, split: str, rows: np.ndarray) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel: those given, else of the training images, of 10,000 where they are not in memory."""
        mean, deviation = self.channel_mean, self.channel_deviation
        if mean is None or deviation is None:
            if isinstance(self._images[split], Images):
                rows = np.sort(np.random.default_rng(0).permutation(rows)[:STATISTICS_SAMPLE])
            own = channel_statistics(self._images[split], rows)
            mean, deviation = mean or own[0], deviation or own[1]
        return list(mean), list(deviation)

    def _normalise(self, mean: list[float], deviation: list[float]) -> None:
        """Sets what images go through from now on."""
        self.mean, self.deviation = mean, deviation
        transform = evaluation_transform(self._spec.grid, self.eval_resize, mean, deviation)
        for samples in self._splits.values():
            if isinstance(samples, Stacked):
                samples.normalise(mean, deviation)
            else:
                samples.transform = transform

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: how inputs are normalised, what the classes are called, and which data they were."""
        kept = {"mean": self.mean, "deviation": self.deviation}
        return kept | {"class_names": list(self.spec.class_names), "fingerprint": self.spec.fingerprint}

    def adopt(self, state: dict[str, Any]) -> None:
        """Normalise as a trained model was, whose checkpoint holds ``state``; raises DataError where its classes are others."""
        check_classes(self.spec.name, self.spec.class_names, state["class_names"])
        self._normalise(list(state["mean"]), list(state["deviation"]))

    def shown(self, inputs: torch.Tensor) -> list[np.ndarray]:
        """The pictures behind a batch's inputs, uint8 (height, width[, 3]) each."""
        mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.deviation))
        pixels = (255 * (inputs.detach().float().cpu() * deviation + mean)).round().clamp(0, 255).to(torch.uint8)
        return list((pixels.squeeze(1) if self.channels == 1 else pixels.permute(0, 2, 3, 1)).numpy())

    def _training_samples(self) -> Stacked | StackedCrops | Pictures | AugmentedPictures:
        samples = self._split("train")
        if self.augmentation is None:
            return samples
        if isinstance(samples, Stacked) and StackedCrops.fits(self.augmentation):
            return StackedCrops(samples, self.augmentation)
        transform = training_transform(self.augmentation, self._spec.grid, self.eval_resize, self.mean, self.deviation)
        return AugmentedPictures(samples, transform)

    def _fingerprint(self) -> str:
        """16 hexadecimal digits over shape, statistics and labels of all splits, and over their pixels where these are in memory."""
        digest = hashlib.sha256(repr((self._spec.grid, self.channels, self.mean, self.deviation)).encode())
        for split in SPLITS:
            samples = self._splits[split]
            digest.update(f"{split} {len(samples)}".encode() + samples.labels.tobytes())
            if not isinstance(samples.images, Images):
                for row in samples.rows:
                    digest.update(samples.images[row].tobytes())
        return digest.hexdigest()[:16]


class Pictures:
    """Samples of one split: (float32 (channels, height, width), label).

    Args:
        images: row of the source's split -> uint8 (height, width[, 3]).
        labels: int64 (n,), of the samples.
        rows: int64 (n,), where the samples' images are.

    Attributes:
        transform: Pillow image -> tensor.
    """

    def __init__(self, images: Sequence[np.ndarray] | Images, labels: np.ndarray, rows: np.ndarray):
        self.images, self.labels, self.rows = images, labels, rows
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[self.rows[index]])), int(self.labels[index])


class AugmentedPictures:
    """Samples of a split through a random transform; the loader has a generator for each sample, copy of it, and epoch."""

    def __init__(self, samples: Pictures | Stacked, transform: Any):
        self.samples, self.transform = samples, transform
        self._last: tuple[int, Any] = (-1, None)  # repeated augmentation asks for an image several times in a row: decoded once

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, index: int, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
        row = int(self.samples.rows[index])
        if self._last[0] != row:
            self._last = (row, Image.fromarray(self.samples.images[row]))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(int(rng.integers(1 << 63)))
            return self.transform(self._last[1]), int(self.samples.labels[index])


def collate(samples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """List of (image, label) -> batch."""
    return {"inputs": torch.stack([image for image, _ in samples]), "labels": torch.tensor([label for _, label in samples])}
