"""Texts, and pairs of texts, as numbered tokens with a limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lba_exp.data.vocabulary import ByteVocabulary, given

_BATCH = 1_000  # texts that are tokenised at a time
_CLS, _SEP = ByteVocabulary.ids["[CLS]"], ByteVocabulary.ids["[SEP]"]


@dataclass
class Tokens:
    """Tokens of n samples, one after the other: each is [CLS] first [SEP], or [CLS] first [SEP] second [SEP].

    Attributes:
        flat: (sum of lengths,), int32 or uint16.
        starts: (n + 1,) int64, where each sample begins and the last one ends.
        second: (n,) int32, tokens of a sample before its second text; all of them where there is none.
        cut: samples that were longer than the limit.
    """

    flat: np.ndarray
    starts: np.ndarray
    second: np.ndarray
    cut: int

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def take(self, rows: np.ndarray) -> Tokens:
        """Samples by their numbers; ``cut`` is then not known, and 0."""
        parts = [self.flat[self.starts[row] : self.starts[row + 1]] for row in rows]
        return _joined(parts, self.second[rows], 0, self.flat.dtype)


class WordPieces:
    """Tokens of a vocabulary, put together as BERT does (arXiv 1810.04805): of two texts that are too long together, the longer one is
    cut first.

    Args:
        kind, vocabulary, lowercase: see ``lba_exp.data.vocabulary.given``.
        max_length: tokens of a sample at most, [CLS] and [SEP] among them.

    Attributes:
        size: number of tokens.
        identity: short hash, equal for equal vocabularies.
    """

    def __init__(self, kind: str, vocabulary: str | None, lowercase: bool, max_length: int):
        found = given(kind, vocabulary, lowercase)
        self.tokenizer, self.size, self.identity, self._word = found.tokenizer, found.size, found.identity, found.word
        self.tokenizer.enable_truncation(max_length, strategy="longest_first")

    def encode(self, first: list[str], second: list[str] | None) -> Tokens:
        parts, before, cut = [], [], 0
        for start in range(0, len(first), _BATCH):
            texts: Any = first[start : start + _BATCH]
            if second is not None:
                texts = list(zip(texts, second[start : start + _BATCH], strict=True))
            for encoding in self.tokenizer.encode_batch(texts):
                ids = np.array(encoding.ids, np.int32)
                parts.append(ids)
                before.append(len(ids) - sum(encoding.type_ids))
                cut += bool(encoding.overflowing)
        return _joined(parts, np.array(before, np.int32), cut, np.int32)

    def words(self, ids: list[int]) -> list[str]:
        return [self._word(token) for token in ids]


class Bytes:
    """The bytes of a text, see ``lba_exp.data.vocabulary.ByteVocabulary``.

    Args:
        max_length: as of ``WordPieces``.
    """

    size, identity = ByteVocabulary.size, ByteVocabulary.identity

    def __init__(self, max_length: int):
        self.max_length = max_length

    def encode(self, first: list[str], second: list[str] | None) -> Tokens:
        parts, before, cut = [], [], 0
        for row, text in enumerate(first):
            texts = [np.frombuffer(text.encode(), np.uint8)]
            if second is not None:
                texts.append(np.frombuffer(second[row].encode(), np.uint8))
            room = self.max_length - 1 - len(texts)
            lengths = _longest_first([len(text) for text in texts], room)
            cut += sum(lengths) < sum(len(text) for text in texts)
            part = np.full(1 + sum(lengths) + len(texts), _SEP, np.uint16)
            part[0], at = _CLS, 1
            for text, length in zip(texts, lengths, strict=True):
                part[at : at + length] = text[:length]
                at += length + 1
            parts.append(part)
            before.append(lengths[0] + 2)
        return _joined(parts, np.array(before, np.int32), cut, np.uint16)

    def words(self, ids: list[int]) -> list[str]:
        return [ByteVocabulary().word(token) for token in ids]


def side_by_side(first: Tokens, second: Tokens) -> Tokens:
    """Samples of two texts that were encoded apart: [CLS] first [SEP] [CLS] second [SEP]; ``cut`` counts texts, not samples."""
    parts = []
    for row in range(len(first.second)):
        parts += [tokens.flat[tokens.starts[row] : tokens.starts[row + 1]] for tokens in (first, second)]
    joined = _joined(parts, first.lengths.astype(np.int32), first.cut + second.cut, first.flat.dtype)
    joined.starts = joined.starts[::2]
    return joined


def _longest_first(lengths: list[int], room: int) -> list[int]:
    """Lengths that fit, the longer text cut first."""
    over = sum(lengths) - room
    if over <= 0:
        return lengths
    if len(lengths) == 1:
        return [room]
    short = min(lengths[0], lengths[1], room // 2)
    return [short, room - short] if lengths[0] <= lengths[1] else [room - short, short]


def _joined(parts: list[np.ndarray], second: np.ndarray, cut: int, dtype: Any) -> Tokens:
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return Tokens(np.concatenate(parts) if parts else np.empty(0, dtype), starts, second, cut)
