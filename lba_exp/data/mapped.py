"""Generated data sets as runs read them: arrays that stay in their files, mapped into memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lba_exp.data.prepared import Manifest, is_prepared, read_manifest
from lba_exp.data.sources import Source


def holds(source: Source, kind: str) -> bool:
    """Whether a source is a folder of ``lba-data`` with data of that kind (``prepared.KINDS``)."""
    return source.kind == "folder" and is_prepared(source.path) and read_manifest(source.path).kind == kind


def read_images(folder: Path, manifest: Manifest) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """Images uint8 (n, height, width) and labels int64 (n,) of each split, and the classes' names."""
    from lba_exp.data.generate.pathfinder import CLASSES

    images = {split: np.load(folder / f"{split}_images.npy", mmap_mode="r") for split in manifest.splits}
    return images, {split: np.load(folder / f"{split}_labels.npy").astype(np.int64) for split in manifest.splits}, list(CLASSES)


def read_sequences(folder: Path, split: str) -> SequenceSplit:
    """The sequences of one split."""
    return SequenceSplit(
        np.load(folder / f"{split}_tokens.npy", mmap_mode="r"),
        np.load(folder / f"{split}_lengths.npy"),
        np.load(folder / f"{split}_labels.npy"),
    )


class SequenceSplit:
    """Samples of one split: (tokens uint8 (length,), label).

    Args:
        tokens: uint8 (sum of lengths,), one sequence after the other.
        lengths, labels: integers (n,).
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, labels: np.ndarray):
        self.tokens, self.labels = tokens, labels
        self.bounds = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.tokens[self.bounds[index] : self.bounds[index + 1]], int(self.labels[index])
