"""Images as sequences of pixels: the embedded digits, a local folder, or a data set of the hub."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from lba_exp.data import lra_release
from lba_exp.data.base import SplitData
from lba_exp.data.catalogue import check
from lba_exp.data.labels import SPLITS, check_classes, cut_splits, read_labels
from lba_exp.data.mapped import holds, read_images
from lba_exp.data.pixels import AUGMENTATIONS, MEMORY_LIMIT, STATISTICS_SAMPLE, Images, decode, shift, statistics
from lba_exp.data.prepared import Manifest
from lba_exp.data.reading import drop_unreadable, pick_splits, read_splits
from lba_exp.data.sources import resolve_source
from lba_exp.data.spec import DataSpec
from lba_exp.errors import DataError
from lba_exp.messages import unknown

LAYOUTS = ("pixels", "image")


class PixelSequences(SplitData):
    """Classification of images, each a sequence of its grey pixels in row-major order, or whole.

    A batch is ``{"inputs": (B, L, 1) float32, "labels": (B,) int64}``, with inputs (B, 1, height, width) in the layout "image"; inputs
    have the mean of the training split's pixels taken off and are divided by their standard deviation. Training batches come shuffled
    from a ``ResumableLoader`` (not shuffled under Lightning's ``overfit_batches``); evaluation gives each sample exactly once over all
    devices. Images are decoded once and kept as uint8; beyond 2 GiB they are decoded when asked for, and mean and deviation come from
    10,000 training images. Images that ``lba-data`` generated stay in their files, which are mapped into memory.

    Args:
        source: "digits" (scikit-learn's 1,797 digits of 8 x 8 pixels, split 70/10/20 %), a local folder (train.parquet and test.parquet,
            one written by ``save_to_disk``, images as train/CLASS/*.png, one of ``lba-data``, or Pathfinder in Long Range Arena's own
            download, see ``lba_exp.data.lra_release``), or a hub name, "org/name" or "org/name:config".
        name: what the data set is called; None: from ``source``.
        image_column, label_column: where images and labels are; labels are ClassLabel, integers 0..n-1 or strings.
        size: resize to size x size pixels; None: as they are.
        padded_size: then put in the middle of padded_size x padded_size pixels, 0 around; None: as they are.
        unreadable: "error", or "skip": images that cannot be read are looked for in ``setup``, left out and counted.
        pixel_mean, pixel_deviation: in place of the training split's own, for pixels in 0..1.
        validation_fraction, test_fraction: share of the source's training split that becomes a split which the source lacks, by label.
        split_seed: of those cuts.
        batch_size, eval_batch_size: sequences a batch on one device, in training and otherwise.
        workers: processes that load; 0: the training process itself.
        seed: of the training order and the augmentation.
        augment: "none", or "shift" (training images moved by up to one pixel each way).
        layout: "pixels" (sequences), or "image" (for models that cut patches).

    Attributes:
        notes: what happened to the data, in sentences, after ``setup``.
        skipped: split of the source -> images left out, where there are any.

    Raises:
        DataError: an unknown ``augment`` or ``layout``; in ``setup``: data that is missing or not as described.
    """

    def __init__(
        self,
        source: str = "digits",
        *,
        name: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        size: int | None = None,
        padded_size: int | None = None,
        unreadable: str = "error",
        pixel_mean: float | None = None,
        pixel_deviation: float | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        workers: int = 0,
        seed: int = 0,
        augment: str = "none",
        layout: str = "pixels",
    ):
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, workers=workers, seed=seed)
        if layout not in LAYOUTS:
            raise DataError(unknown(str(layout), LAYOUTS, "a layout (data.layout)"))
        if augment not in AUGMENTATIONS:
            raise DataError(unknown(str(augment), AUGMENTATIONS, "an augmentation (data.augment)"))
        self.source, self.name, self.image_column, self.label_column, self.size = source, name, image_column, label_column, size
        self.validation_fraction, self.test_fraction, self.split_seed = validation_fraction, test_fraction, split_seed
        self.padded_size, self.pixel_mean, self.pixel_deviation = padded_size, pixel_mean, pixel_deviation
        self.augment, self.layout, self.unreadable = augment, layout, unreadable
        self.notes: list[str] = []
        self.skipped: dict[str, int] = {}
        self._raw: dict[str, Any] | None = None
        self._prepared: Manifest | None = None

    def prepare_data(self) -> None:
        """Reads, or downloads, on one process; the others then find it in the cache."""
        source = resolve_source(self.source)
        if self._splits is None and self._raw is None and not holds(source, "images"):
            self._raw = self._read(source)

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks, cuts and decodes all splits, once; raises DataError."""
        if self._splits is not None:
            return
        source = resolve_source(self.source)
        name = self.name or source.name
        mapped = holds(source, "images")
        pixels, labels, class_names, shape = self._mapped(source) if mapped else self._decoded(source)
        cut = cut_splits(labels, validation_fraction=self.validation_fraction, test_fraction=self.test_fraction, seed=self.split_seed)
        of, rows = cut["train"]
        if sum(len(found) for found in pixels.values()) * shape[0] * shape[1] > MEMORY_LIMIT:
            rows = np.sort(np.random.default_rng(0).permutation(rows)[:STATISTICS_SAMPLE])
        mean, deviation = self.pixel_mean, self.pixel_deviation
        if mean is None or deviation is None:
            own = statistics(pixels[of], rows)
            mean, deviation = own[0] if mean is None else mean, own[1] if deviation is None else deviation
        self._normalise = Normalise(mean, deviation, self.layout)
        self._splits = {split: PixelSplit(pixels[of], labels[of][rows], rows) for split, (of, rows) in cut.items()}
        self._spec = DataSpec(
            name=name,
            length=shape[0] * shape[1],
            classes=len(class_names),
            class_names=class_names,
            channels=1,
            vocabulary=None,
            sizes={split: len(found) for split, found in self._splits.items()},
            fingerprint=self._fingerprint(shape),
            grid=shape,
        )

    def _decoded(self, source: Any) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str], tuple[int, int]]:
        """Pixels and labels of each split of the source, the classes' names, and height and width."""
        raw, self._raw = self._raw or self._read(source), None
        if self.unreadable == "skip":
            raw, self.skipped, notes = drop_unreadable(raw, self.image_column, source.name, self.workers)
            self.notes += notes
        images = {
            split: Images(dataset, self.image_column, self.size, f"{source.name}, {split} split", padded_size=self.padded_size)
            for split, dataset in raw.items()
        }
        labels, class_names = read_labels(raw, self.label_column, source.name)
        shape = images["train"].shape
        for found in images.values():
            found.shape = shape  # of the training split's first image, so that a split of another size is noticed too
        fits = sum(len(found) for found in images.values()) * shape[0] * shape[1] <= MEMORY_LIMIT
        pixels = decode(images, show=self.trainer is None or self.trainer.is_global_zero) if fits else images
        return pixels, labels, class_names, shape

    def _read(self, source: Any) -> dict[str, Any]:
        folder = lra_release.pathfinder_folder(source)
        if folder is None:
            return read_splits(source)
        found, self.notes = lra_release.read_pathfinder(folder)
        return pick_splits({"train": found}, source.name, {})

    def _mapped(self, source: Any) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str], tuple[int, int]]:
        """The same of a folder of images that ``lba-data`` generated."""
        self._prepared = check(source.path)
        pixels, labels, class_names = read_images(source.path, self._prepared)
        shape = pixels["train"].shape[1:]
        for key in ("size", "padded_size"):
            if (size := getattr(self, key)) is not None and shape != (size, size):
                raise DataError(f"{source.path} holds images of {shape[1]} x {shape[0]} pixels: leave data.{key}={size} out.")
        return pixels, labels, class_names, shape

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: how inputs are normalised, what the classes are called, and which data they were."""
        spec = self.spec
        kept = {"mean": self._normalise.mean, "deviation": self._normalise.deviation}
        return kept | {"class_names": list(spec.class_names), "fingerprint": spec.fingerprint}

    def adopt(self, state: dict[str, Any]) -> None:
        """Normalise as a trained model was, whose checkpoint holds ``state``; raises DataError where its classes are others."""
        check_classes(self.spec.name, self.spec.class_names, state["class_names"])
        self._normalise = Normalise(state["mean"], state["deviation"], self.layout)

    def shown(self, inputs: torch.Tensor) -> list[np.ndarray]:
        """The pictures behind a batch's inputs, uint8 (height, width) each."""
        pixels = inputs.detach().float().cpu() * self._normalise.deviation + self._normalise.mean
        return list((255 * pixels).round().clamp(0, 255).to(torch.uint8).reshape(-1, *self.spec.grid).numpy())

    def _training_samples(self) -> PixelSplit | Augmented:
        samples, augment = self._split("train"), AUGMENTATIONS[self.augment]
        return samples if augment is None else Augmented(samples, augment)

    @property
    def _collate(self) -> Normalise:
        return self._normalise

    def _fingerprint(self, shape: tuple[int, int]) -> str:
        """16 hexadecimal digits over shapes, labels and pixels of all splits; where not all are decoded, of the pixels the statistics."""
        digest = hashlib.sha256(repr((shape, self._normalise.mean, self._normalise.deviation)).encode())
        if self._prepared is not None:
            digest.update(self._prepared.fingerprint.encode())
            return digest.hexdigest()[:16]
        for split in SPLITS:
            samples = self._splits[split]
            digest.update(f"{split} {len(samples)}".encode() + samples.labels.tobytes())
            if isinstance(samples.images, np.ndarray):
                for start in range(0, len(samples), 4_096):
                    digest.update(samples.images[samples.rows[start : start + 4_096]].tobytes())
        return digest.hexdigest()[:16]


class PixelSplit:
    """Samples of one split: (uint8 image (height, width), label)."""

    def __init__(self, images: np.ndarray | Images, labels: np.ndarray, rows: np.ndarray):
        self.images, self.labels, self.rows = images, labels, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[self.rows[index]], int(self.labels[index])


class Augmented:
    """Samples of a split with an augmentation ``(image, rng) -> image``, drawn by the loader for each sample and epoch."""

    def __init__(self, samples: PixelSplit, augment: Any = shift):
        self.samples, self.augment = samples, augment

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        image, label = self.samples[index]
        return self.augment(image, rng), label


class Normalise:
    """List of (uint8 image, label) -> batch; ``mean`` and ``deviation`` are those of pixels in 0..1, ``layout`` is one of LAYOUTS."""

    def __init__(self, mean: float, deviation: float, layout: str = "pixels"):
        self.mean, self.deviation, self.layout = mean, deviation, layout
        # 256 values in a table: no arithmetic on every pixel, and no threads that compete with the model's
        self._table = ((np.arange(256) / 255 - mean) / deviation).astype(np.float32)

    def __call__(self, samples: list[tuple[np.ndarray, int]]) -> dict[str, torch.Tensor]:
        inputs = self._table.take(np.stack([image for image, _ in samples]))
        inputs = inputs[:, None] if self.layout == "image" else inputs.reshape(len(samples), -1, 1)
        return {"inputs": torch.from_numpy(inputs), "labels": torch.tensor([label for _, label in samples])}
