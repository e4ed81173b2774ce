"""Which inputs a model takes, by the data that it was trained on."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lba_exp.inference.loading import Trained
from lba_exp.inference.pictures import Pictures
from lba_exp.inference.preparing import Preparation, Sequences
from lba_exp.inference.texts import LabelledTexts, ListOps, Texts
from lba_exp.models.language import CausalLM, MaskedLM, TextClassifier

KINDS: dict[str, type[Preparation]] = {
    "pixel_sequences": Pictures,
    "image_classification": Pictures,
    "token_sequences": ListOps,
    "text_classification": LabelledTexts,
    "text_blocks": Texts,
    "text_stream": Texts,
}


def preparation(trained: Trained, vocabulary: str | Path | None = None) -> Preparation:
    """What the inputs of a model go through; raises DataError where its checkpoint lacks what that takes."""
    if trained.settings is not None and trained.settings.data.kind in KINDS:
        return KINDS[trained.settings.data.kind](trained, vocabulary)
    if isinstance(trained.model, MaskedLM | CausalLM):
        return Texts(trained, vocabulary)
    return (Sequences if _reads_tokens(trained.model) else Preparation)(trained, vocabulary)


def _reads_tokens(model: nn.Module) -> bool:
    return isinstance(model, TextClassifier) or getattr(model, "channels", 0) is None
