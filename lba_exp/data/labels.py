"""Label numbers, and the cutting of splits that a source does not have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lba_exp.data.reading import check_column, first_line
from lba_exp.errors import DataError

SPLITS = ("train", "validation", "test")


def read_labels(splits: Mapping[str, Any], column: str, where: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Labels of each split as int64 (n,) in 0..classes-1, and the classes' names.

    A ClassLabel keeps its numbers and names; integers must be 0..n-1 in the training split; strings are numbered in sorted order.

    Args:
        splits: split -> ``datasets.Dataset``, "train" among them.
        column: the column that holds the labels.
        where: the data set's name, for messages.

    Raises:
        DataError: no such column; labels missing, of another type, with gaps, or not among the training split's; fewer than two classes.
    """
    values = {split: _values(dataset, column, f"{where}, {split} split") for split, dataset in splits.items()}
    keys, names = _classes(splits["train"].features[column], values["train"], f"{where}, train split")
    if len(names) < 2:
        raise DataError(f"{where}: the label column {column!r} has the one class {names[0]}: expected two or more.")
    number = {key: index for index, key in enumerate(keys)}
    labels = {}
    for split, found in values.items():
        kinds, inverse = np.unique(found, return_inverse=True)
        strange = [kind for kind in kinds.tolist() if kind not in number]
        if strange:
            raise DataError(f"{where}, {split} split: {some(strange)} in column {column!r} is no class; the classes are {some(keys)}.")
        labels[split] = np.array([number[kind] for kind in kinds.tolist()], dtype=np.int64)[inverse]
    return labels, names


def read_numbers(splits: Mapping[str, Any], column: str, where: str) -> dict[str, np.ndarray]:
    """Labels of each split as float32 (n,); arguments as of ``read_labels``.

    Raises:
        DataError: no such column; labels missing, not finite, or of another type than integers and floats.
    """
    labels = {}
    for split, dataset in splits.items():
        here = f"{where}, {split} split"
        check_column(dataset, column, "label_column", here)
        found = dataset.select_columns(column).with_format(None)[:][column]
        kind = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)  # noqa: E731
        if wrong := [row for row, value in enumerate(found) if not kind(value)]:
            raise DataError(
                f"{here}: {len(wrong)} of {len(found)} samples have no number in column {column!r} "
                f"(the first is number {wrong[0]}: {found[wrong[0]]!r})."
            )
        labels[split] = np.asarray(found, dtype=np.float32)
    return labels


def _values(dataset: Any, column: str, where: str) -> np.ndarray:
    import datasets

    check_column(dataset, column, "label_column", where)
    feature = dataset.features[column]
    if not isinstance(feature, datasets.ClassLabel | datasets.Value):
        raise DataError(f"{where}: the label column {column!r} holds {type(feature).__name__}, not class labels, integers or strings.")
    found = dataset.select_columns(column).with_format(None)[:][column]
    missing = [row for row, value in enumerate(found) if value is None or value == ""]
    if missing:
        raise DataError(f"{where}: {len(missing)} of {len(found)} samples have no {column!r} (the first is number {missing[0]}).")
    values = np.asarray(found)
    if values.dtype.kind not in "iubU":
        raise DataError(f"{where}: the label column {column!r} holds {feature.dtype}, not class labels, integers or strings.")
    return values.astype(np.int64) if values.dtype.kind == "b" else values


def _classes(feature: Any, train: np.ndarray, where: str) -> tuple[list, list[str]]:
    """The values that stand for the classes, in their order, and the classes' names."""
    if getattr(feature, "names", None):
        return list(range(len(feature.names))), list(feature.names)
    keys = np.unique(train).tolist()
    if train.dtype.kind != "U" and keys != list(range(len(keys))):
        raise DataError(f"{where}: integer labels must be 0..n-1 without gaps, and these are {some(keys)}.")
    return keys, [str(key) for key in keys]


def check_classes(name: str, own: Sequence[str], theirs: Sequence[str]) -> None:
    """Raises DataError where the data called ``name`` has other classes than ``theirs``, those that a model was trained on."""
    own, theirs = list(own), list(theirs)
    named = not all(word.isdecimal() for word in theirs) and not all(word.isdecimal() for word in own)
    if len(theirs) != len(own) or (named and theirs != own):
        raise DataError(
            f"{name} has the classes {some(own)}, and the model was trained on {some(theirs)}: give data of those classes, in that order."
        )


def some(values: Iterable) -> str:
    """Values in words, at most ten."""
    words = [str(value) for value in values]
    return ", ".join(words if len(words) <= 10 else [*words[:9], "...", words[-1]])


def cut_splits(
    labels: Mapping[str, np.ndarray], *, validation_fraction: float, test_fraction: float, seed: int
) -> dict[str, tuple[str, np.ndarray]]:
    """Where the samples of train, validation and test are: split -> (split of the source, row numbers there, int64).

    A split that the source lacks is cut from its training split, stratified by label: that fraction of all the rows there, in their
    order. The cut depends on the labels, the fractions and ``seed`` alone; the test split is cut first.

    Raises:
        DataError: the cut would leave a split empty, or too small to hold every class.
    """
    from sklearn.model_selection import train_test_split

    train = labels["train"]
    rest = np.arange(len(train))
    rows = {split: (split, np.arange(len(found))) for split, found in labels.items()}
    for split, fraction in (("test", test_fraction), ("validation", validation_fraction)):
        if split in rows:
            continue
        size = round(fraction * len(train))
        try:
            rest, taken = train_test_split(rest, test_size=size, stratify=train[rest], random_state=seed)
        except ValueError as error:
            raise DataError(
                f"no {split} split of {size} samples can be cut from the {len(train)} of the train split ({first_line(error)}): "
                f"give the data a {split} split of its own, or change data.{split}_fraction."
            ) from error
        rows[split] = ("train", np.sort(taken))
    rows["train"] = ("train", np.sort(rest))
    return {split: rows[split] for split in SPLITS}
