"""Text as blocks of tokens, for masked and causal language models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lba_exp.data import vocabulary as vocabularies
from lba_exp.data.base import SplitData
from lba_exp.data.blocks import CausalBlocks, FreshlyMasked, MaskedBlocks, Masking, stack
from lba_exp.data.cache import kept
from lba_exp.data.labels import SPLITS
from lba_exp.data.reading import check_column, read_splits
from lba_exp.data.sources import resolve_source
from lba_exp.data.spec import DataSpec
from lba_exp.errors import DataError
from lba_exp.messages import unknown

OBJECTIVES = ("masked", "causal")
TOKENISED = 1  # version of the tokens that are kept, to be raised with every change after which they are others
_BATCH = 1_000  # texts that are tokenised at a time


class TextBlocks(SplitData):
    """The texts of a corpus, one after the other with [SEP] behind each, cut into blocks of ``max_length`` tokens.

    A batch is ``{"inputs": (B, max_length) int64, "labels": (B, max_length) int64}``; there is no padding, and what is left at the end of
    a split makes no block. Empty texts are left out. Tokens are kept in files, 4 bytes each, from which further runs on the same texts read
    them (``data.cache``).

    ``objective="masked"``: a block is [CLS], max_length - 2 tokens, [SEP], some of them hidden, see ``lba_exp.data.blocks.Masking``. In
    training the choice is drawn anew for every (seed, epoch, block); in validation and test it is the same for a block each time.

    ``objective="causal"``: labels are the inputs moved by one, the next token at each position.

    Args:
        source: a local folder or a hub name, see ``lba_exp.data.sources``.
        name: what the data set is called; None: from ``source``.
        text_column: the column that holds the texts.
        tokens: "wordpiece", "bpe" or "bytes".
        vocabulary: vocab.txt or tokenizer.json, or the folder of one, see ``lba_exp.data.vocabulary.given``.
        vocabulary_size: of a vocabulary that is trained on the training texts, where none is given.
        lowercase: put texts into lower case and take accents away; a tokenizer.json says that itself.
        max_length: tokens of a block, at least 8.
        objective: "masked" or "causal".
        mask_fraction, eval_mask_fraction: of training, and of validation and test.
        validation_fraction, test_fraction: share of the texts of the source's training split that becomes a split which it lacks.
        split_seed: of those cuts.
        cache: the folder for trained vocabularies and for tokens; None: lba_exp in the cache of ``datasets``.
        batch_size, eval_batch_size: blocks a batch on one device, in training and otherwise.
        workers: processes that load; 0: the training process itself.
        seed: of the training order and of the choice of tokens in training.

    Attributes:
        vocabulary: what texts are cut into; None before ``setup`` where it is trained there.
        notes: what happened to the data, in sentences, after ``setup``.

    Raises:
        DataError: no or another vocabulary file; in ``setup``: data that is missing, not as described, or too little for a block.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str | None = None,
        text_column: str = "text",
        tokens: str = "wordpiece",
        vocabulary: str | None = None,
        vocabulary_size: int | None = None,
        lowercase: bool = True,
        max_length: int = 128,
        objective: str = "masked",
        mask_fraction: float = 0.3,
        eval_mask_fraction: float = 0.15,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        cache: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, workers=workers, seed=seed)
        for value, valid, what in ((objective, OBJECTIVES, "an objective (data.objective)"), (tokens, vocabularies.KINDS, "data.tokens")):
            if value not in valid:
                raise DataError(unknown(str(value), valid, what))
        self.source, self.name, self.text_column = source, name, text_column
        self.tokens, self.vocabulary_size, self.lowercase, self.cache = tokens, vocabulary_size, lowercase, cache
        self.max_length, self.objective = max_length, objective
        self.fractions = {"train": mask_fraction, "validation": eval_mask_fraction, "test": eval_mask_fraction}
        self.cuts = {"test": test_fraction, "validation": validation_fraction}
        self.split_seed = split_seed
        trains = vocabulary is None and vocabulary_size is not None and tokens != "bytes"
        self.vocabulary = None if trains else vocabularies.given(tokens, vocabulary, lowercase)
        self.notes: list[str] = []
        self._collate = stack

    @property
    def block_size(self) -> int:
        """Tokens of the text that make a sample."""
        return self.max_length - 2 if self.objective == "masked" else self.max_length + 1

    def prepare_data(self) -> None:
        """Reads, or downloads, on one process; the others then find it in the cache."""
        if self._splits is None:
            read_splits(resolve_source(self.source))

    def setup(self, stage: str | None = None) -> None:
        """Reads, cuts and tokenises all splits, once; raises DataError."""
        if self._splits is not None:
            return
        source = resolve_source(self.source)
        texts = {}
        for split, dataset in read_splits(source).items():
            where = f"{source.name}, {split} split"
            check_column(dataset, self.text_column, "text_column", where)
            texts[split] = dataset.select_columns(self.text_column).with_format(None)[:][self.text_column]
            check_texts(texts[split], where)
        rows = cut(texts, self.cuts, self.split_seed)
        texts = {split: [text for row in found if (text := texts[of][row])] for split, (of, found) in rows.items()}
        self._learn(texts["train"])
        blocks = {split: self._blocks(found) for split, found in texts.items()}
        self._describe(self.name or source.name, blocks)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: which they were, and with what vocabulary."""
        return {"fingerprint": self.spec.fingerprint, "vocabulary": self.vocabulary.identity}

    def adopt(self, state: dict[str, Any]) -> None:
        """Called with what the checkpoint of a trained model holds; raises DataError where it was trained on another vocabulary."""
        if state["vocabulary"] != self.vocabulary.identity:
            raise DataError(f"{self.spec.name} is read with another vocabulary than the model was trained with (data.vocabulary).")

    def shown(self, inputs: torch.Tensor) -> list[list[str]]:
        """The tokens behind a batch's inputs, in words."""
        return [[self.vocabulary.word(token) for token in row] for row in inputs.tolist()]

    def _training_samples(self) -> FreshlyMasked | CausalBlocks:
        samples = self._split("train")
        return FreshlyMasked(samples) if isinstance(samples, MaskedBlocks) else samples

    def _learn(self, texts: list[str]) -> None:
        """The vocabulary, where it is to be trained on these texts."""
        if self.vocabulary is not None:
            return
        of, size = {"sha256": hashed(texts)}, self.vocabulary_size
        self.vocabulary, path = vocabularies.trained(texts, self.tokens, size, self.lowercase, of=of, cache=self.cache)
        few = f" ({size:,} were asked for: the texts have no more)" if self.vocabulary.size < size else ""
        self.notes.append(
            f"trained on the texts: {self.vocabulary.size:,} {self.tokens} tokens{few}; with data.tokens={self.tokens} "
            f"data.vocabulary={path} other runs read texts as this one does."
        )

    def _blocks(self, texts: list[str]) -> np.ndarray:
        """The tokens of texts in blocks: int32 (n, block_size), a view of a file."""
        made_of = {"sha256": hashed(texts), "vocabulary": self.vocabulary.identity, "version": TOKENISED}
        folder = kept("tokens", made_of, partial(self._write, texts), self.cache)
        stream = np.load(folder / "tokens.npy", mmap_mode="r")
        return stream[: len(stream) // self.block_size * self.block_size].reshape(-1, self.block_size)

    def _write(self, texts: list[str], folder: Path) -> None:
        np.save(folder / "tokens.npy", joined(self.vocabulary, texts))

    def _describe(self, name: str, blocks: Mapping[str, np.ndarray], **further: Any) -> None:
        """Sets splits and spec; raises DataError where a split has no block.

        Args:
            blocks: split -> (n, block_size) of those that are there whole.
            further: facts that tell these data from others.
        """
        for split, found in blocks.items():
            if not len(found):
                raise DataError(f"the {split} split of {name} is too small for one block of {self.max_length} tokens (data.max_length).")
        self._splits = {split: self._samples(split, found) for split, found in blocks.items()}
        about = (self.objective, self.max_length, self.fractions, self.vocabulary.identity)
        digest = hashlib.sha256(repr((*about, sorted(further.items())) if further else about).encode())
        for split, found in ((split, blocks[split]) for split in SPLITS if split in blocks):
            digest.update(f"{split} {len(found)}".encode() + found.tobytes())
        size = self.vocabulary.size
        self._spec = DataSpec(
            name=name,
            length=self.max_length,
            classes=size,
            class_names=[self.vocabulary.word(number) for number in range(size)],
            channels=None,
            vocabulary=size,
            sizes={split: len(found) for split, found in blocks.items()},
            fingerprint=digest.hexdigest()[:16],
            metrics=("accuracy", "perplexity"),
        )

    def _samples(self, split: str, blocks: np.ndarray) -> MaskedBlocks | CausalBlocks:
        if self.objective == "causal":
            return CausalBlocks(blocks)
        return MaskedBlocks(blocks, self._masking(split), [self.split_seed, SPLITS.index(split)])

    def _masking(self, split: str) -> Masking:
        return Masking(self.fractions[split], self.vocabulary.ids, self.vocabulary.size)


def joined(vocabulary: Any, texts: list[str]) -> np.ndarray:
    """The tokens of texts one after the other, [SEP] behind each: int32 (n,)."""
    end = np.array([vocabulary.ids["[SEP]"]], np.int32)
    parts = []
    for start in range(0, len(texts), _BATCH):
        for tokens in vocabulary.encode(texts[start : start + _BATCH]):
            parts += (tokens, end)
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def check_texts(texts: Sequence[Any], where: str) -> None:
    """Raises DataError where some are no texts, with the first of them."""
    if wrong := [row for row, text in enumerate(texts) if not isinstance(text, str)]:
        raise DataError(f"{where}: {len(wrong)} of {len(texts)} rows hold no text (the first is number {wrong[0]}).")


def hashed(texts: Iterable[str]) -> str:
    """sha256 over texts and where each of them ends, hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def cut(texts: Mapping[str, Sequence], fractions: Mapping[str, float], seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """Where the rows of train, validation and test are: split -> (split of the source, row numbers there).

    A split that the source lacks is cut from its training split: that fraction of all the rows there, drawn by ``seed``; test first.
    """
    rest = np.arange(len(texts["train"]))
    rows = {split: (split, np.arange(len(found))) for split, found in texts.items()}
    rng = np.random.default_rng(seed)
    for split in ("test", "validation"):
        if split not in rows:
            order = rng.permutation(rest)
            size = round(fractions[split] * len(texts["train"]))
            rows[split], rest = ("train", np.sort(order[:size])), np.sort(order[size:])
    rows["train"] = ("train", rest)
    return {split: rows[split] for split in SPLITS}
