"""Generated data sets as files of numpy's own format, which are mapped into memory rather than read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from lba_exp.data.generate import listops, pathfinder
from lba_exp.data.generate.blocks import generate, progress


def write_listops(folder: Path, rule: listops.ListOpsRule, splits: Mapping[str, int], seed: int, workers: int) -> None:
    """SPLIT_tokens.npy uint8 (sum of lengths,), SPLIT_lengths.npy int64 (n,) and SPLIT_labels.npy uint8 (n,) of each split."""
    with progress("drawing trees", sum(splits.values())) as advance:
        for number, (split, samples) in enumerate(splits.items()):
            parts = []
            for part in generate(partial(listops.make, rule), samples, listops.BLOCK, seed=seed, split=number, workers=workers):
                parts.append(part)
                advance(len(part.labels))
            for name in ("tokens", "lengths", "labels"):
                np.save(folder / f"{split}_{name}.npy", np.concatenate([getattr(part, name) for part in parts]))


def write_pathfinder(folder: Path, rule: pathfinder.PathfinderRule, splits: Mapping[str, int], seed: int, workers: int) -> None:
    """SPLIT_images.npy uint8 (n, size, size) and SPLIT_labels.npy uint8 (n,) of each split."""
    with progress("drawing images", sum(splits.values())) as advance:
        for number, (split, samples) in enumerate(splits.items()):
            images = open_memmap(folder / f"{split}_images.npy", "w+", np.uint8, (samples, rule.size, rule.size))
            labels, start = np.empty(samples, np.uint8), 0
            for part in generate(partial(pathfinder.make, rule), samples, pathfinder.BLOCK, seed=seed, split=number, workers=workers):
                end = start + len(part.labels)
                images[start:end], labels[start:end], start = part.images, part.labels, end
                advance(len(part.labels))
            images.flush()
            np.save(folder / f"{split}_labels.npy", labels)
