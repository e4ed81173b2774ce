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


class MappedSequences:
    """Samples of one split: (tokens uint8 (length,), label)."""

    def __init__(self, folder: Path, split: str):
        self.tokens = np.load(folder / f"{split}_tokens.npy", mmap_mode="r")
        self.labels = np.load(folder / f"{split}_labels.npy")
        self.bounds = np.concatenate([[0], np.cumsum(np.load(folder / f"{split}_lengths.npy"))])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.tokens[self.bounds[index] : self.bounds[index + 1]], int(self.labels[index])
