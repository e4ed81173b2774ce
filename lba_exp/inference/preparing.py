"""From raw inputs to what a model is called with: what all models have in common, and sequences of token numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lba_exp.errors import DataError
from lba_exp.inference.loading import Trained

Batch = dict[str, Tensor]


class Preparation:
    """What is known of a model's inputs; this base knows no more than the model itself, and takes arrays alone.

    Attributes:
        raw: what the raw inputs are, in words: "images", "texts", "pairs of texts"; None: there are none.
        columns: of a table that holds them, where they are texts.
        cut: texts that were longer than the model's inputs, so far.
        class_names: of a classifier; None where nothing was kept.
    """

    raw: str | None = None
    columns: tuple[str, ...] = ()

    def __init__(self, trained: Trained, vocabulary: str | Path | None = None):
        self.path, self.model, self.kept = trained.path, trained.model, trained.kept
        self.data: Any = None if trained.settings is None else trained.settings.data
        self.config: Mapping[str, Any] = getattr(self.model, "config", None) or {}
        self.given, self.cut = vocabulary, 0
        self.pairs = getattr(self.model, "token_dimension", 1) == 2

    @property
    def class_names(self) -> list[str] | None:
        found = self.kept.get("class_names", self.kept.get("classes"))
        return None if found is None else [str(name) for name in found]

    def items(self, found: Sequence[Any]) -> Batch:
        """A batch of raw inputs; DataError for those that are none of this model's."""
        known = f"it takes {self.raw}" if self.raw else "it keeps nothing of its data, so that it takes arrays alone"
        raise DataError(f"{type(found[0]).__name__} is no input of the model in {self.path}: {known}.")

    def values(self, pixels: np.ndarray) -> np.ndarray:
        """Integers as the values that a model takes them for; DataError where they mean nothing to it."""
        raise DataError(f"the model in {self.path} takes floating-point values, and these are {pixels.dtype}.")

    def arrays(self, array: np.ndarray | Tensor, **further: np.ndarray | Tensor) -> Batch:
        """A batch of what the model gets, or of one such input.

        Args:
            array: token numbers (B, L) or (L,); values (B, L, channels), (L, channels), or without the last dimension where channels is 1;
                images (B, channels, height, width) or (channels, height, width). For two towers with a dimension of 2 before L. Floating
                numbers are taken as they are: already normalised.
            further: padding_mask and token_types, of the shape of the tokens.
        """
        one, found = self.is_one(array), _tensor(array)
        if (channels := getattr(self.model, "channels", None)) is None:
            found = found if found.is_floating_point() or found.dtype == torch.bool else found.long()
        elif not found.is_floating_point():
            raise DataError(f"{found.dtype} of shape {tuple(found.shape)} is no input of {self.path}: {self._values_words()}.")
        elif self._squeezed(found.shape, channels):
            found = found.unsqueeze(-1)
        batch = {"inputs": found} | {name: _tensor(value) for name, value in further.items()}
        if "padding_mask" in batch:
            batch["padding_mask"] = batch["padding_mask"].bool()
        return {name: value[None] for name, value in batch.items()} if one else batch

    def is_one(self, array: np.ndarray | Tensor) -> bool:
        """Whether an array for ``arrays`` is one input, and no batch of them."""
        channels = getattr(self.model, "channels", None)
        if channels is None:
            return array.ndim == 1 + self.pairs
        if hasattr(self.model, "patches"):
            return array.ndim == 3
        return array.ndim + self._squeezed(array.shape, channels) == 2 + self.pairs

    def _squeezed(self, shape: Sequence[int], channels: int) -> bool:
        """Whether the last dimension, of size 1, is left out."""
        return channels == 1 and not hasattr(self.model, "patches") and shape[-1] != 1

    def _values_words(self) -> str:
        return "give floating-point values, normalised as its training data were"


class Sequences(Preparation):
    """Base of what takes sequences of tokens: raw inputs are integer arrays (n,), or what a subclass makes such arrays of."""

    raw = "sequences of token numbers"

    def items(self, found: Sequence[Any]) -> Batch:
        return padded([self._tokens(item) for item in found], 1)

    def _tokens(self, item: Any) -> np.ndarray:
        array = np.asarray(item) if isinstance(item, np.ndarray | Tensor | list | tuple) else None
        if array is None or array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
            super().items([item])
        return array.astype(np.int64)


def padded(tokens: Sequence[np.ndarray], multiple: int) -> Batch:
    """Sequences of several lengths -> inputs (B, L) int64, 0 behind, and padding_mask (B, L) bool."""
    lengths = np.array([len(found) for found in tokens])
    mask = np.arange(-(-lengths.max() // multiple) * multiple) < lengths[:, None]
    inputs = np.zeros(mask.shape, np.int64)
    inputs[mask] = np.concatenate(tokens)
    return {"inputs": torch.from_numpy(inputs), "padding_mask": torch.from_numpy(mask)}


def _tensor(array: np.ndarray | Tensor) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))  # a copy: a mapped file is not to be written to
