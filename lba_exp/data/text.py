"""Text as blocks of WordPiece tokens, for masked and causal language models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lba_exp.data.base import SplitData
from lba_exp.data.labels import SPLITS
from lba_exp.data.reading import check_column, read_splits
from lba_exp.data.sources import resolve_source, vocabulary_file
from lba_exp.data.spec import DataSpec
from lba_exp.errors import DataError
from lba_exp.messages import unknown

OBJECTIVES = ("masked", "causal")
IGNORED_LABEL = -100
SPECIAL = ("[CLS]", "[SEP]", "[MASK]")
_BATCH = 1_000  # texts that are tokenised at a time


class TextBlocks(SplitData):
    """The texts of a corpus, one after the other with [SEP] behind each, cut into blocks of ``max_length`` tokens.

    A batch is ``{"inputs": (B, max_length) int64, "labels": (B, max_length) int64}``; there is no padding, and what is left at the end of
    a split makes no block. Tokens are kept in memory, 4 bytes each.

    ``objective="masked"`` (BERT, arXiv 1810.04805): a block is [CLS], max_length - 2 tokens, [SEP]. Each token but [CLS] and [SEP] is
    chosen with the probability ``mask_fraction`` (at least one a block), and becomes [MASK] in 80, any token in 10, and itself in 10 of
    100 cases; labels are the tokens that were chosen, and -100 elsewhere. In training the choice is drawn anew for every (seed, epoch,
    block); in validation and test it is the same for a block each time.

    ``objective="causal"``: labels are the inputs moved by one, the next token at each position.

    Args:
        source: a local folder or a hub name, see ``lba_exp.data.sources``.
        name: what the data set is called; None: from ``source``.
        text_column: the column that holds the texts.
        vocabulary: file of a WordPiece vocabulary, one token a line (as of bert-base-uncased), [CLS], [SEP], [MASK], [UNK] among them.
        lowercase: put texts into lower case and take accents away.
        max_length: tokens of a block, at least 8.
        objective: "masked" or "causal".
        mask_fraction, eval_mask_fraction: of training, and of validation and test.
        validation_fraction, test_fraction: share of the texts of the source's training split that becomes a split which it lacks.
        split_seed: of those cuts.
        batch_size, eval_batch_size: blocks a batch on one device, in training and otherwise.
        workers: processes that load; 0: the training process itself.
        seed: of the training order and of the choice of tokens in training.

    Raises:
        DataError: no or another vocabulary file; in ``setup``: data that is missing, not as described, or too little for a block.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str | None = None,
        text_column: str = "text",
        vocabulary: str | None = None,
        lowercase: bool = True,
        max_length: int = 128,
        objective: str = "masked",
        mask_fraction: float = 0.3,
        eval_mask_fraction: float = 0.15,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, workers=workers, seed=seed)
        if objective not in OBJECTIVES:
            raise DataError(unknown(str(objective), OBJECTIVES, "an objective (data.objective)"))
        self.source, self.name, self.text_column, self.lowercase = source, name, text_column, lowercase
        self.max_length, self.objective = max_length, objective
        self.fractions = {"train": mask_fraction, "validation": eval_mask_fraction, "test": eval_mask_fraction}
        self.cuts = {"test": test_fraction, "validation": validation_fraction}
        self.split_seed = split_seed
        self.tokenizer = wordpiece(vocabulary, lowercase)
        self._collate = stack

    def prepare_data(self) -> None:
        """Reads, or downloads, on one process; the others then find it in the cache."""
        if self._splits is None:
            read_splits(resolve_source(self.source))

    def setup(self, stage: str | None = None) -> None:
        """Reads, cuts and tokenises all splits, once; raises DataError."""
        if self._splits is not None:
            return
        source = resolve_source(self.source)
        name = self.name or source.name
        texts = {}
        for split, dataset in read_splits(source).items():
            where = f"{source.name}, {split} split"
            check_column(dataset, self.text_column, "text_column", where)
            texts[split] = dataset.select_columns(self.text_column).with_format(None)[:][self.text_column]
            if wrong := [row for row, text in enumerate(texts[split]) if not isinstance(text, str)]:
                raise DataError(f"{where}: {len(wrong)} of {len(texts[split])} rows hold no text (the first is number {wrong[0]}).")
        rows = cut(texts, self.cuts, self.split_seed)
        size = self.max_length - 2 if self.objective == "masked" else self.max_length + 1
        blocks = {split: self._blocks([texts[of][row] for row in found], size) for split, (of, found) in rows.items()}
        for split, found in blocks.items():
            if not len(found):
                raise DataError(f"the {split} split of {name} is too small for one block of {self.max_length} tokens (data.max_length).")
        ids = {token: self.tokenizer.token_to_id(token) for token in SPECIAL}
        total = self.tokenizer.get_vocab_size()
        if self.objective == "masked":
            self._splits = {
                split: MaskedBlocks(found, self.fractions[split], ids, total, [self.split_seed, number])
                for number, (split, found) in enumerate(blocks.items())
            }
        else:
            self._splits = {split: CausalBlocks(found) for split, found in blocks.items()}
        digest = hashlib.sha256(repr((self.objective, self.max_length, self.fractions, self._vocabulary_hash())).encode())
        for split in SPLITS:
            digest.update(f"{split} {len(blocks[split])}".encode() + blocks[split].tobytes())
        self._spec = DataSpec(
            name=name,
            length=self.max_length,
            classes=total,
            class_names=[self.tokenizer.id_to_token(number) for number in range(total)],
            channels=None,
            vocabulary=total,
            sizes={split: len(found) for split, found in blocks.items()},
            fingerprint=digest.hexdigest()[:16],
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: which they were, and with what vocabulary."""
        return {"fingerprint": self.spec.fingerprint, "vocabulary": self._vocabulary_hash()}

    def adopt(self, state: dict[str, Any]) -> None:
        """Called with what the checkpoint of a trained model holds; raises DataError where it was trained on another vocabulary."""
        if state["vocabulary"] != self._vocabulary_hash():
            raise DataError(f"{self.spec.name} is read with another vocabulary than the model was trained with (data.vocabulary).")

    def shown(self, inputs: torch.Tensor) -> list[list[str]]:
        """The tokens behind a batch's inputs, in words."""
        return [[self.tokenizer.id_to_token(token) for token in row] for row in inputs.tolist()]

    def _training_samples(self) -> FreshlyMasked | CausalBlocks:
        samples = self._split("train")
        return FreshlyMasked(samples) if isinstance(samples, MaskedBlocks) else samples

    def _blocks(self, texts: list[str], size: int) -> np.ndarray:
        """The tokens of texts in blocks: int32 (n, size)."""
        end = self.tokenizer.token_to_id("[SEP]")
        parts = []
        for start in range(0, len(texts), _BATCH):
            for encoding in self.tokenizer.encode_batch(texts[start : start + _BATCH], add_special_tokens=False):
                parts.append(np.array([*encoding.ids, end], np.int32))
        stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
        return stream[: len(stream) // size * size].reshape(-1, size)

    def _vocabulary_hash(self) -> str:
        return vocabulary_hash(self.tokenizer, self.lowercase)


class MaskedBlocks:
    """Blocks with some of their tokens hidden: (inputs, labels), int64 (length,).

    Args:
        blocks: int32 (n, length - 2), without [CLS] and [SEP].
        fraction: share of the tokens to choose.
        ids: numbers of [CLS], [SEP] and [MASK].
        vocabulary: number of tokens.
        seed: of the choice where the loader draws none (``blocks[index]``).
    """

    def __init__(self, blocks: np.ndarray, fraction: float, ids: Mapping[str, int], vocabulary: int, seed: list[int]):
        self.blocks, self.fraction, self.ids, self.vocabulary, self.seed = blocks, fraction, dict(ids), vocabulary, list(seed)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.hide(index, np.random.default_rng([*self.seed, index]))

    def hide(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The sample with the choice drawn from ``rng``."""
        tokens = self.blocks[index].astype(np.int64)
        free = np.flatnonzero(tokens != self.ids["[SEP]"])
        if not len(free):  # a block of ends of empty texts
            free = np.arange(len(tokens))
        chosen = free[rng.random(len(free)) < self.fraction]
        if not len(chosen):
            chosen = rng.choice(free, 1)
        labels = np.full(len(tokens), IGNORED_LABEL, np.int64)
        labels[chosen] = tokens[chosen]
        way = rng.random(len(chosen))
        tokens[chosen[way < 0.8]] = self.ids["[MASK]"]
        other = chosen[way >= 0.9]
        tokens[other] = rng.integers(self.vocabulary, size=len(other))
        inputs = np.concatenate([[self.ids["[CLS]"]], tokens, [self.ids["[SEP]"]]])
        return inputs, np.concatenate([[IGNORED_LABEL], labels, [IGNORED_LABEL]])


class FreshlyMasked:
    """Masked blocks whose tokens the loader chooses anew in every epoch."""

    def __init__(self, samples: MaskedBlocks):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self.samples.hide(index, rng)


class CausalBlocks:
    """Blocks and their successors: (inputs, labels), int64 (length,), from int32 (n, length + 1)."""

    def __init__(self, blocks: np.ndarray):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.blocks[index].astype(np.int64)
        return tokens[:-1], tokens[1:]


def stack(samples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """List of (inputs, labels) -> batch."""
    inputs, labels = (torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))
    return {"inputs": inputs, "labels": labels}


def wordpiece(vocabulary: str | None, lowercase: bool) -> Any:
    """The tokenizer of a vocabulary, a file or its folder; DataError where there is none, or one without the tokens that are needed."""
    from tokenizers import BertWordPieceTokenizer

    if vocabulary is None:
        raise DataError("data.vocabulary is not given: name the file of a WordPiece vocabulary, one token a line, or its folder.")
    path = vocabulary_file(vocabulary)
    try:
        tokenizer = BertWordPieceTokenizer(str(path), lowercase=lowercase)
    except Exception as error:  # the library raises bare exceptions
        raise DataError(f"data.vocabulary={vocabulary} cannot be read ({error}).") from None
    if missing := [token for token in (*SPECIAL, "[UNK]") if tokenizer.token_to_id(token) is None]:
        raise DataError(f"data.vocabulary={vocabulary} lacks {', '.join(missing)}: it is no vocabulary of BERT's.")
    return tokenizer


def vocabulary_hash(tokenizer: Any, lowercase: bool) -> str:
    """Short hash of a tokenizer, equal for equal vocabularies."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr((lowercase, vocabulary)).encode()).hexdigest()[:16]


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
