"""What a prepared folder holds, to look at: a picture of some images of each class, or some samples as text."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from lba_exp.data.prepared import Manifest

COLUMNS = 6  # images of a class
_ROWS = 10  # classes at most
_TEXTS = 5
_CHARACTERS = 600  # of a text
_SEARCHED = 2_000  # samples among which those of each class are sought


def has_images(folder: Path, manifest: Manifest) -> bool:
    """Whether the samples are images."""
    return manifest.kind == "images" or (manifest.kind == "table" and "image" in _table(folder, manifest).column_names)


def draw_sheet(folder: Path, manifest: Manifest, path: Path) -> None:
    """Writes a PNG: a row for each class, of the first images of a split."""
    split = next(iter(manifest.splits))
    if manifest.kind == "images":
        from lba_exp.data.generate.pathfinder import CLASSES

        images = np.load(folder / f"{split}_images.npy", mmap_mode="r")[:_SEARCHED]
        labels, names = np.load(folder / f"{split}_labels.npy")[:_SEARCHED], list(CLASSES)
    else:
        table = _table(folder, manifest)
        table = table.select(range(min(_SEARCHED, len(table))))
        images, labels, names = table["image"], np.asarray(table["label"]), table.features["label"].names
    rows = []
    for label, name in enumerate(names[:_ROWS]):
        chosen = np.flatnonzero(labels == label)[:COLUMNS]
        rows.append([(f"{label}: {name}", np.asarray(images[int(number)])) for number in chosen])
    _draw(rows, f"{manifest.name}, {split} split", path)


def draw_augmented(module: Any, path: Path) -> None:
    """Writes a PNG: a row for each class, of its first training image as evaluation has it, and of draws of its augmentation.

    Args:
        module: an ``ImageClassification``, set up.
    """
    samples = module.train_dataloader().dataset
    labels, rows = samples.samples.labels, []
    for label in np.unique(labels)[:_ROWS]:
        index = int(np.flatnonzero(labels == label)[0])
        rngs = (np.random.default_rng([module.seed, draw, index]) for draw in range(COLUMNS - 1))
        found = [samples.samples[index][0], *(samples.draw(index, rng)[0] for rng in rngs)]
        title = f"{label}: {module.spec.class_names[label]}"
        rows.append([(title if column == 0 else "", module.shown(image[None])[0]) for column, image in enumerate(found)])
    _draw(rows, f"{module.spec.name}, training images without and with augmentation", path)


def _draw(rows: list[list[tuple[str, np.ndarray]]], title: str, path: Path) -> None:
    """A grid of (title, picture)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.8 * COLUMNS, 1.8 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, pictures in zip(grid, rows, strict=True):
        for axes, (name, picture) in zip(row, pictures, strict=False):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, format="png", dpi=150)


def text_sheet(folder: Path, manifest: Manifest) -> str:
    """Some samples of the first split, in words."""
    split = next(iter(manifest.splits))
    if manifest.kind == "tokens":
        samples = _sequences(folder, split)
    elif manifest.kind == "vocabulary":
        tokens = (folder / "vocab.txt").read_text("utf-8").splitlines()
        samples = [(f"{len(tokens):,} tokens, every {len(tokens) // 50}th", " ".join(tokens[:: len(tokens) // 50]))]
    else:
        table = _table(folder, manifest).select(range(_TEXTS))
        labels = table.features.get("label")
        samples = [(labels.names[row["label"]] if labels else "text", row["text"]) for row in table]
    lines = [f"{manifest.name}, {split}"]
    for head, text in samples:
        lines += ["", f"[{head}]", *textwrap.wrap(textwrap.shorten(text, _CHARACTERS, placeholder=" ..."), 100, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


def _sequences(folder: Path, split: str) -> list[tuple[str, str]]:
    from lba_exp.data.generate.listops import TOKENS

    tokens = np.load(folder / f"{split}_tokens.npy", mmap_mode="r")
    lengths, labels = (np.load(folder / f"{split}_{name}.npy")[:_TEXTS] for name in ("lengths", "labels"))
    ends = np.cumsum(lengths)
    words = [" ".join(TOKENS[token] for token in tokens[end - length : end]) for length, end in zip(lengths, ends, strict=True)]
    return [(f"value {label}, {length:,} tokens", text) for label, length, text in zip(labels, lengths, words, strict=True)]


def _table(folder: Path, manifest: Manifest) -> Any:
    import datasets

    return datasets.Dataset.from_parquet(str(folder / f"{next(iter(manifest.splits))}.parquet"))
