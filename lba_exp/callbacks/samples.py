"""A few test samples with what the model says of them, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np

from lba_exp.results.compare import IGNORED_LABEL


@dataclass
class Sample:
    """One prediction.

    Attributes:
        shown: what was predicted from: a uint8 picture (height, width[, 3]), or tokens.
        position: of the token that was predicted; None where the whole sample was.
        prediction, label: in words.
        probability: that the model gives its prediction.
    """

    shown: np.ndarray | list[str]
    position: int | None
    prediction: str
    label: str
    probability: float

    @property
    def correct(self) -> bool:
        return self.prediction == self.label


class Samples(pl.Callback):
    """Keeps predictions for the first test samples, from what ``test_step`` returns ({"logits", "labels"}) and the data module's ``shown``.

    Args:
        samples: so many of the first test batch.
        tokens: of each, at most so many predicted tokens, where a task labels tokens.

    Attributes:
        found: the predictions, on the first device; empty before the test, or where task or data show nothing.
    """

    def __init__(self, samples: int = 16, tokens: int = 4):
        self.samples, self.tokens = samples, tokens
        self.found: list[Sample] = []

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        shown = getattr(trainer.datamodule, "shown", None)
        if batch_idx or dataloader_idx or not trainer.is_global_zero or shown is None or not isinstance(outputs, Mapping):
            return
        if getattr(getattr(pl_module, "model", None), "sequence_ranks", None) is not None:
            return  # a part of each sequence is here, and nothing to be looked at
        inputs = shown(batch["inputs"][: self.samples])
        if inputs is None:
            return
        rows = self._rows(batch["labels"][: self.samples])
        number = [row for row, _, _ in rows]
        probabilities, predicted = outputs["logits"][number].detach().float().softmax(-1).max(-1)
        names, mask = trainer.datamodule.spec.class_names, batch.get("padding_mask")
        if mask is not None:
            real = mask[: self.samples].flatten(1).tolist()  # of two towers: one text after the other
            inputs = [
                [t for t, keep in zip(x, m, strict=True) if keep] if isinstance(x, list) else x for x, m in zip(inputs, real, strict=True)
            ]
        labels = outputs["labels"][number].tolist()
        self.found = [
            Sample(inputs[sample], position, names[guess], names[label], probability)
            for (_, sample, position), guess, label, probability in zip(
                rows, predicted.tolist(), labels, probabilities.tolist(), strict=True
            )
        ]

    def _rows(self, labels: Any) -> list[tuple[int, int, int | None]]:
        """(row of the logits, sample, position) of each prediction that is kept; tokens' logits come one labelled token after another."""
        if labels.ndim == 1:
            return [(sample, sample, None) for sample in range(len(labels))]
        kept, seen = [], [0] * len(labels)
        for row, (sample, position) in enumerate((labels != IGNORED_LABEL).nonzero().tolist()):
            seen[sample] += 1
            if seen[sample] <= self.tokens:
                kept.append((row, sample, position))
        return kept
