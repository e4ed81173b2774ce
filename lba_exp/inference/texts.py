"""Texts on their way into a model: cut into the tokens of the run's vocabulary, to the run's length."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lba_exp.data.generate.listops import TOKENS
from lba_exp.data.labelled import Padded
from lba_exp.data.tokens import Bytes, Tokens, WordPieces, side_by_side
from lba_exp.data.vocabulary import given
from lba_exp.errors import DataError
from lba_exp.inference.loading import Trained
from lba_exp.inference.preparing import Batch, Preparation, Sequences
from lba_exp.inference.vocabularies import embedding_of, file_of, kind_of
from lba_exp.models.language import MaskedLM

MASK = "[MASK]"


class ListOps(Sequences):
    """ListOps in words, ``[MAX 4 [MIN 2 3 ] 1 ]``; parentheses are left out."""

    raw, columns = "ListOps in words ([MAX 4 [MIN 2 3 ] 1 ])", ("Source",)
    numbers = {token: number for number, token in enumerate(TOKENS) if number}  # noqa: RUF012 (0 is padding)

    @property
    def class_names(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def _tokens(self, item: Any) -> np.ndarray:
        if not isinstance(item, str):
            return super()._tokens(item)
        words = item.replace("(", "").replace(")", "").split()
        if wrong := [word for word in words if word not in self.numbers]:
            raise DataError(f"{wrong[0]!r} is no token of ListOps: {' '.join(self.numbers)}.")
        if not words:
            raise DataError("an input holds no tokens: ListOps has one a word.")
        return np.array([self.numbers[word] for word in words], np.int64)


class Texts(Sequences):
    """Texts for a language model, [CLS] text [SEP] for a masked one; [MASK] in a text is the token of that name."""

    raw = "texts"

    def __init__(self, trained: Trained, vocabulary: str | Path | None = None):
        super().__init__(trained, vocabulary)
        self.columns = ("text" if self.data is None else self.data.text_column,)

    @cached_property
    def words(self) -> Any:
        """The vocabulary that the model was trained with."""
        return given(kind_of(self), _text(file_of(self)), self.data is None or self.data.lowercase)

    @property
    def max_length(self) -> int | None:
        return self.data.max_length if self.data is not None else self.config.get("length")

    @property
    def class_names(self) -> list[str]:
        """The vocabulary's tokens; their numbers where it cannot be had."""
        size = embedding_of(self.model).num_embeddings
        try:
            return [self.words.word(number) if number < self.words.size else str(number) for number in range(size)]
        except DataError:
            return [str(number) for number in range(size)]

    def _tokens(self, item: Any) -> np.ndarray:
        if not isinstance(item, str):
            return super()._tokens(item)
        parts: list[int] = []
        for number, found in enumerate(self.words.encode(item.split(MASK))):
            parts += ([self.words.ids[MASK]] if number else []) + found.tolist()
        masked, ids = isinstance(self.model, MaskedLM), self.words.ids
        if self.max_length is not None and len(parts) > (room := self.max_length - 2 * masked):
            parts, self.cut = parts[:room], self.cut + 1
        if masked:
            parts = [ids["[CLS]"], *parts, ids["[SEP]"]]
        if not parts:
            raise DataError("an input is an empty text, and a causal model predicts from what stands before.")
        return np.array(parts, np.int64)


class LabelledTexts(Sequences):
    """Texts, or pairs of texts, for a classifier of texts."""

    def __init__(self, trained: Trained, vocabulary: str | Path | None = None):
        super().__init__(trained, vocabulary)
        self.columns = tuple(c for c in (self.data.text_column, self.data.second_text_column) if c is not None)
        self.raw = "pairs of texts" if len(self.columns) == 2 else "texts"

    @cached_property
    def words(self) -> Bytes | WordPieces:
        """What cuts texts as the run did."""
        limit = self.data.max_length
        path = _text(file_of(self))
        return Bytes(limit) if path is None else WordPieces(kind_of(self), path, self.data.lowercase, limit)

    def items(self, found: Sequence[Any]) -> Batch:
        number = len(self.columns)
        texts = [(item,) if isinstance(item, str) else item for item in found]
        for item in texts:
            if not isinstance(item, tuple | list) or len(item) != number or not all(isinstance(text, str) for text in item):
                if number == 1:
                    return super().items(found)
                Preparation.items(self, [item])
        columns = [list(column) for column in zip(*texts, strict=True)]
        apart = self.pairs
        if apart:
            tokens = side_by_side(*(self.words.encode(column, None) for column in columns))
        else:
            tokens = self.words.encode(columns[0], columns[1] if number == 2 else None)
        self.cut += tokens.cut
        typed = number == 2 and not apart and "token_types" in inspect.signature(self.model.forward).parameters
        collate = Padded(self.data.pad_multiple, self.data.max_length, typed, False, apart)
        batch = collate([(tokens.flat[slice(*bounds)].astype(np.int64), int(second), 0) for bounds, second in _samples(tokens)])
        batch.pop("labels")
        return batch


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _samples(tokens: Tokens) -> list[tuple[tuple[int, int], int]]:
    bounds = zip(tokens.starts[:-1], tokens.starts[1:], strict=True)
    return list(zip(bounds, tokens.second, strict=True))
