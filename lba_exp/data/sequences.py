"""Sequences of tokens with a class each, of lengths that differ: ListOps."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from lba_exp.data import lra_release
from lba_exp.data.base import SplitData
from lba_exp.data.catalogue import check
from lba_exp.data.generate.listops import TOKENS, ListOpsRule
from lba_exp.data.mapped import SequenceSplit, holds, read_sequences
from lba_exp.data.sources import resolve_source
from lba_exp.data.spec import DataSpec
from lba_exp.errors import DataError


class TokenSequences(SplitData):
    """Classification of sequences of tokens, those of a batch filled up with the token 0 to the longest of them.

    A batch is ``{"inputs": (B, L) int64, "padding_mask": (B, L) bool, True at real tokens, "labels": (B,) int64}``. Generated tokens stay
    in their files, which are mapped into memory; those of the benchmark's download are kept in memory, a byte each.

    Args:
        source: a folder that ``lba-data prepare listops`` wrote, or the one of Long Range Arena's own download (listops-1000), see
            ``lba_exp.data.lra_release``.
        name: what the data set is called; None: from ``source``.
        batch_size, eval_batch_size: sequences a batch on one device, in training and otherwise.
        workers: processes that load; 0: the training process itself.
        seed: of the training order.

    Raises:
        DataError: in ``setup``: the source is no such folder, or not as its manifest says.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, workers=workers, seed=seed)
        self.source, self.name = source, name
        self._collate = pad

    def setup(self, stage: str | None = None) -> None:
        """Opens all splits, once; raises DataError."""
        if self._splits is not None:
            return
        source = resolve_source(self.source)
        if holds(source, "tokens"):
            manifest = check(source.path)
            self._splits = {split: read_sequences(source.path, split) for split in manifest.splits}
            longest, fingerprint = manifest.specification["shorter_than"] - 1, manifest.fingerprint
        elif lra_release.is_listops(source):
            found = lra_release.read_listops(source.path)
            self._splits = {split: SequenceSplit(part.tokens, part.lengths, part.labels) for split, part in found.items()}
            digest = hashlib.sha256()
            for part in found.values():
                for array in (part.lengths, part.labels, part.tokens):
                    digest.update(array.tobytes())
            longest = max(ListOpsRule().shorter_than - 1, *(int(part.lengths.max()) for part in found.values()))
            fingerprint = digest.hexdigest()[:16]
        else:
            raise DataError(
                f"data.source={self.source} holds no sequences of tokens: give a folder of `lba-data prepare listops FOLDER`, or the "
                "listops-1000 of Long Range Arena's download."
            )
        self._spec = DataSpec(
            name=self.name or source.name,
            length=longest,
            classes=10,
            class_names=[str(digit) for digit in range(10)],
            channels=None,
            vocabulary=len(TOKENS),
            sizes={split: len(samples) for split, samples in self._splits.items()},
            fingerprint=fingerprint,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: which they were, and the tokens in the order of their numbers."""
        return {"fingerprint": self.spec.fingerprint, "tokens": list(TOKENS)}

    def adopt(self, state: dict[str, Any]) -> None:
        """Called with what the checkpoint of a trained model holds; raises DataError where its tokens are others."""
        if list(state["tokens"]) != list(TOKENS):
            raise DataError(f"{self.spec.name} has other tokens than the data that the model was trained on.")

    def shown(self, inputs: torch.Tensor) -> list[list[str]]:
        """The tokens behind a batch's inputs, in words."""
        return [[TOKENS[token] for token in row] for row in inputs.tolist()]


def pad(samples: list[tuple[np.ndarray, int]]) -> dict[str, torch.Tensor]:
    """List of (tokens (length,), label) -> batch."""
    lengths = np.array([len(tokens) for tokens, _ in samples])
    mask = np.arange(lengths.max()) < lengths[:, None]
    inputs = np.zeros(mask.shape, np.int64)
    inputs[mask] = np.concatenate([tokens for tokens, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    return {"inputs": torch.from_numpy(inputs), "padding_mask": torch.from_numpy(mask), "labels": labels}
