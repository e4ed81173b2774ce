"""Texts, or pairs of texts, with a class or a number each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lba_exp.data import lra_release
from lba_exp.data.base import SplitData
from lba_exp.data.buckets import Buckets
from lba_exp.data.glue import is_original, read_original
from lba_exp.data.labels import SPLITS, cut_splits, read_labels, read_numbers
from lba_exp.data.reading import check_column, pick_splits
from lba_exp.data.sources import Source, resolve_source
from lba_exp.data.spec import DataSpec
from lba_exp.data.tables import read_tables
from lba_exp.data.text import cut
from lba_exp.data.tokens import Bytes, Tokens, WordPieces, side_by_side
from lba_exp.data.vocabulary import KINDS
from lba_exp.errors import DataError
from lba_exp.messages import unknown


class TextClassification(SplitData):
    """Texts with a label each: a column of texts, or two of pairs, and one of labels.

    A sample is [CLS] text [SEP], or [CLS] first [SEP] second [SEP]. A batch is ``{"inputs": (B, L) int64, "padding_mask": (B, L) bool,
    "labels": (B,) int64, or float32 for numbers}`` and, for pairs, ``"token_types": (B, L) int64``, 1 in the second text. L is the longest
    sample's length, rounded up to a multiple of ``pad_multiple``. Tokens are kept in memory, 2 to 4 bytes each.

    With ``apart``, for models of two towers, each text of a pair is a sequence of its own, [CLS] text [SEP], and ``inputs`` and
    ``padding_mask`` are (B, 2, L).

    Args:
        source: a local folder or a hub name, see ``lba_exp.data.sources`` and ``lba_exp.data.tables``; or Retrieval in Long Range Arena's
            own download (columns text1, text2, label), see ``lba_exp.data.lra_release``.
        name: what the data set is called; None: from ``source``.
        text_column, second_text_column: the columns of the texts; None: no second one.
        label_column: the column of the labels.
        target: "classes" (class labels, integers from 0, or strings), or "number".
        metrics: of validation and test, beside the accuracy, see ``lba_exp.tasks.metrics``; their mean is the score.
        tokens: "wordpiece", "bpe" or "bytes".
        vocabulary, lowercase: see ``lba_exp.data.vocabulary.given``.
        max_length: tokens of a sample (with ``apart``: of a text) at most, at least 8; longer texts are cut, and counted in ``notes``.
        pad_multiple: lengths of batches are multiples of this.
        bucket_steps: batches are sorted by length among so many steps, see ``Buckets``; 0: not at all.
        train_split, validation_split, test_split: the source's names of the splits; None: the usual ones.
        validation_fraction, test_fraction: share of the training split that becomes a split which the source lacks, stratified by class.
        split_seed: of those cuts.
        glue_task: name of a task whose files in GLUE's own layout are read too, see ``lba_exp.data.glue``.
        token_types: put them into the batches of pairs.
        apart: the two texts of a pair are two sequences.
        batch_size, eval_batch_size: samples a batch on one device, in training and otherwise.
        workers: processes that load; 0: the training process itself.
        seed: of the training order.

    Attributes:
        notes: what happened to the data, in sentences, after ``setup``.

    Raises:
        DataError: no or another vocabulary; in ``setup``: data that is missing, or not as described.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str | None = None,
        text_column: str = "text",
        second_text_column: str | None = None,
        label_column: str = "label",
        target: str = "classes",
        metrics: Sequence[str] = (),
        tokens: str = "wordpiece",
        vocabulary: str | None = None,
        lowercase: bool = True,
        max_length: int = 128,
        pad_multiple: int = 8,
        bucket_steps: int = 50,
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        glue_task: str | None = None,
        token_types: bool = True,
        apart: bool = False,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, workers=workers, seed=seed)
        if tokens not in KINDS:
            raise DataError(unknown(str(tokens), KINDS, "a kind of tokens (data.tokens)"))
        if apart and second_text_column is None:
            raise DataError("data.second_text_column is not given, and a model of two towers reads pairs of texts: name it.")
        self.source, self.name, self.label_column, self.target = source, name, label_column, target
        self.text_columns = {"text_column": text_column, "second_text_column": second_text_column}
        self.metrics = tuple(metrics) or (("pearson", "spearman") if target == "number" else ("accuracy",))
        self.tokenizer = Bytes(max_length) if tokens == "bytes" else WordPieces(tokens, vocabulary, lowercase, max_length)
        self.max_length, self.bucket_steps, self.glue_task = max_length, bucket_steps, glue_task
        self.named = {"train": train_split, "validation": validation_split, "test": test_split}
        self.fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
        self.split_seed, self.apart = split_seed, apart
        self.notes: list[str] = []
        typed = token_types and second_text_column is not None and not apart
        self._collate = Padded(pad_multiple, max_length, typed, target == "number", apart)

    def prepare_data(self) -> None:
        """Reads, or downloads, on one process; the others then find it in the cache."""
        if self._splits is None:
            self._read(resolve_source(self.source))

    def setup(self, stage: str | None = None) -> None:
        """Reads, cuts and tokenises all splits, once; raises DataError."""
        if self._splits is not None:
            return
        source = resolve_source(self.source)
        name = self.name or source.name
        raw = self._read(source)
        number = self.target == "number"
        if number:
            labels, names = read_numbers(raw, self.label_column, source.name), [self.label_column]
        else:
            labels, names = read_labels(raw, self.label_column, source.name)
        if number:
            rows = cut(labels, {key.removesuffix("_fraction"): value for key, value in self.fractions.items()}, self.split_seed)
        else:
            rows = cut_splits(labels, **self.fractions, seed=self.split_seed)
        once: dict[int, Tokens] = {}  # GLUE's validation split is its test split too
        for split, dataset in raw.items():
            if id(dataset) not in once:
                once[id(dataset)] = self._encode(dataset, f"{source.name}, {split} split")
        encoded = {split: once[id(dataset)] for split, dataset in raw.items()}
        self._splits = {
            split: LabelledTexts(tokens if len(found) == len(tokens.second) else tokens.take(found), labels[of][found])
            for split, (of, found) in rows.items()
            for tokens in (encoded[of],)
        }
        if empty := [split for split, samples in self._splits.items() if not len(samples)]:
            raise DataError(f"the {empty[0]} split of {name} would be empty: give it a split of its own, or more samples.")
        self._spec = DataSpec(
            name=name,
            length=self.max_length,
            classes=len(names),
            class_names=names,
            channels=None,
            vocabulary=self.tokenizer.size,
            sizes={split: len(samples) for split, samples in self._splits.items()},
            fingerprint=self._fingerprint(),
            metrics=self.metrics,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: which they were, with what vocabulary, and the classes in their order."""
        kept = {"vocabulary": self.tokenizer.identity, "classes": list(self.spec.class_names)}
        return {"fingerprint": self.spec.fingerprint, **kept}

    def adopt(self, state: dict[str, Any]) -> None:
        """Called with what the checkpoint of a trained model holds; raises DataError where vocabulary or classes are others."""
        if state["vocabulary"] != self.tokenizer.identity:
            raise DataError(f"{self.spec.name} is read with another vocabulary than the model was trained with (data.vocabulary).")
        if self.target == "classes" and state["classes"] != self.spec.class_names:
            there, here = (", ".join(map(str, names)) for names in (state["classes"], self.spec.class_names))
            raise DataError(f"the model was trained on the classes {there}, and {self.spec.name} has {here}.")

    def shown(self, inputs: torch.Tensor) -> list[list[str]] | None:
        """The tokens behind a batch's inputs, in words; None where a number is predicted."""
        return None if self.target == "number" else [self.tokenizer.words(row) for row in inputs.flatten(1).tolist()]

    def _buckets(self, split: str, samples: int) -> Buckets | None:
        if not self.bucket_steps:
            return None
        devices = 1 if self.trainer is None else self.trainer.world_size // self.sequence_parallel_size
        tokens = self._split(split).tokens
        lengths = np.maximum(tokens.second, tokens.lengths - tokens.second) if self.apart else tokens.lengths
        return Buckets(lengths, samples * devices, self.bucket_steps)

    def _read(self, source: Source) -> Mapping[str, Any]:
        if self.glue_task is not None and is_original(source):
            found, notes = read_original(source, self.glue_task)
            self.notes = notes
            return pick_splits(found, source.name, self.named)
        if lra_release.is_aan(source):
            # one character more than fits, so that what is cut is counted
            found, notes = lra_release.read_aan(source.path, self.max_length + 1 if isinstance(self.tokenizer, Bytes) else None)
            self.notes = notes
            return pick_splits(found, source.name, self.named)
        return read_tables(source, self.named)

    def _encode(self, dataset: Any, where: str) -> Tokens:
        texts: list[list[str] | None] = []
        for setting, column in self.text_columns.items():
            if column is None:
                texts.append(None)
                continue
            check_column(dataset, column, setting, where)
            found = dataset.select_columns(column).with_format(None)[:][column]
            if wrong := [row for row, text in enumerate(found) if not isinstance(text, str)]:
                what = type(found[wrong[0]]).__name__.replace("NoneType", "nothing")
                raise DataError(
                    f"{where}: {len(wrong)} of {len(found)} rows hold no text in {column!r} (the first is number {wrong[0]}: {what})."
                )
            texts.append(list(found))
        if self.apart:
            tokens = side_by_side(*(self.tokenizer.encode(column, None) for column in texts))
        else:
            tokens = self.tokenizer.encode(*texts)
        if tokens.cut:
            samples = f"{tokens.cut:,} of {len(tokens.second) * (2 if self.apart else 1):,} texts"
            self.notes.append(f"{where}: {samples} are longer than data.max_length={self.max_length} tokens and are cut.")
        return tokens

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.tokenizer.identity, self.max_length, self.target)).encode())
        for split in SPLITS:
            samples = self._splits[split]
            for part in (samples.tokens.flat, samples.tokens.starts, samples.tokens.second, samples.labels):
                digest.update(f"{split} {part.dtype} {len(part)}".encode() + part.tobytes())
        return digest.hexdigest()[:16]


class LabelledTexts:
    """Samples (tokens int64 (length,), tokens before the second text, label)."""

    def __init__(self, tokens: Tokens, labels: np.ndarray):
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, int | float]:
        label = self.labels[index].item()
        start, stop = self.tokens.starts[index : index + 2]
        return self.tokens.flat[start:stop].astype(np.int64), int(self.tokens.second[index]), label


@dataclass(frozen=True)
class Padded:
    """List of samples -> batch, see ``TextClassification``; padding stands behind."""

    multiple: int
    max_length: int
    token_types: bool
    numbers: bool
    apart: bool = False

    def __call__(self, samples: list[tuple[np.ndarray, int, int | float]]) -> dict[str, torch.Tensor]:
        if self.apart:
            texts = [text for tokens, second, _ in samples for text in (tokens[:second], tokens[second:])]
        else:
            texts = [tokens for tokens, _, _ in samples]
        longest = max(len(tokens) for tokens in texts)
        length = min(-(-longest // self.multiple) * self.multiple, self.max_length)
        inputs = np.zeros((len(texts), length), np.int64)
        mask = np.zeros((len(texts), length), bool)
        for row, tokens in enumerate(texts):
            inputs[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        batch = {"inputs": torch.from_numpy(inputs), "padding_mask": torch.from_numpy(mask)}
        if self.apart:
            batch = {name: value.unflatten(0, (len(samples), 2)) for name, value in batch.items()}
        batch["labels"] = torch.tensor([label for _, _, label in samples], dtype=torch.float32 if self.numbers else torch.int64)
        if self.token_types:
            second = np.array([second for _, second, _ in samples])
            batch["token_types"] = torch.from_numpy((mask & (np.arange(length) >= second[:, None])).astype(np.int64))
        return batch
