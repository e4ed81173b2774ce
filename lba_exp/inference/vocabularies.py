"""The vocabulary that a model was trained with: the file that its run names, one that is kept from its training, or one that is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lba_exp.data.sources import TOKENIZER, vocabulary_file
from lba_exp.data.vocabulary import given
from lba_exp.errors import DataError


def kind_of(owner: Any) -> str:
    """The kind of a preparation's tokens, see ``lba_exp.data.vocabulary.KINDS``."""
    if owner.data is not None:
        return owner.data.tokens
    return _kind_of_json(Path(owner.given)) if owner.given is not None and str(owner.given).endswith(".json") else "wordpiece"


def file_of(owner: Any) -> Path | None:
    """The file of the vocabulary of a preparation's model; None for bytes.

    Args:
        owner: has ``path``, ``model``, ``data`` (the run's settings, or None), ``kept`` (what the checkpoint holds of the data) and
            ``given`` (a file that was named in the place of the run's, or None).

    Raises:
        DataError: it cannot be had, or is another one than that of the training.
    """
    data, wanted, kind = owner.data, owner.kept.get("vocabulary"), kind_of(owner)
    if kind == "bytes":
        return None
    if data is None and owner.given is None:
        raise DataError(f"{owner.path} keeps no vocabulary: give it (vocabulary=FILE, --vocabulary FILE), or token numbers.")
    other = None
    for path in _places(owner):
        try:
            found = given(kind, str(path), True if data is None else data.lowercase)
        except DataError:
            if owner.given is not None:
                raise
            continue
        if wanted is None or found.identity == wanted:
            if found.size > (known := embedding_of(owner.model).num_embeddings):
                raise DataError(f"{path} has {found.size:,} tokens, and the model in {owner.path} knows {known:,}: give its own.")
            return vocabulary_file(str(path))
        other = path
    if other is not None:
        raise DataError(f"{other} is another vocabulary than that of {owner.path}: give the one that it was trained with (--vocabulary).")
    named = f" ({data.vocabulary})" if data.vocabulary else ""
    raise DataError(f"the vocabulary{named} that {owner.path} was trained with is not here any more: give it (--vocabulary FILE).")


def _places(owner: Any) -> Iterator[Path]:
    """Files that may be the vocabulary."""
    if owner.given is not None:
        yield Path(owner.given).expanduser()
    elif owner.data.vocabulary:
        yield Path(owner.data.vocabulary).expanduser()
    else:  # trained on the run's texts, see lba_exp.data.vocabulary.trained
        import datasets

        cache = owner.data.cache
        root = Path(cache).expanduser() if cache else Path(datasets.config.HF_DATASETS_CACHE) / "lba_exp"
        yield from sorted(root.glob(f"tokenizer-*/{TOKENIZER}"))


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The token embedding of a model of symbols."""
    return getattr(model, "encoder", model).embedding


def _kind_of_json(path: Path) -> str:
    try:
        return json.loads(path.expanduser().read_text("utf-8"))["model"]["type"].lower()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "wordpiece"  # the reader of vocabularies says what is wrong
