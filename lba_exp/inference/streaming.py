"""One sequence that need not fit into memory, through a whole model: in chunks, with states of fixed size, to the same answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.errors import ConfigError, DataError
from lba_exp.inference.layers import obstacle, outputs, passes
from lba_exp.inference.tapes import Source, tapes
from lba_exp.models.classifier import SequenceClassifier, TwoTowers
from lba_exp.models.language import CausalLM, MaskedLM, TextClassifier
from lba_exp.models.vision import VisionTransformer
from lba_exp.nn.norms import normalise

CHUNK = 1024

Values = Callable[[np.ndarray], np.ndarray]


class Ends:
    """What is before a model's blocks and behind them, chunk by chunk.

    A subclass says how many tokens the source makes (``length``), embeds some of them (``embed``), and has the model's last norm
    (``last``), and ``head`` behind pooling, or ``logits`` of each token.

    Args:
        model: the whole model.
        source: its inputs.
        values: what integers of a source of values go through.
    """

    first_only = False  # the first token alone becomes the answer
    per_token = False
    length: int

    def __init__(self, model: nn.Module, source: Source, values: Values):
        self.model, self.source, self.values = model, source, values
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device

    def embed(self, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` as the first block gets them: (1, stop - start, width)."""
        raise NotImplementedError

    def last(self, x: Tensor) -> Tensor:
        """The norm behind the last block: (1, n, width) -> (1, n, width)."""
        return normalise(self.model.norm, x, None)

    def head(self, pooled: Tensor) -> Tensor:
        """(1, width) -> (1, classes)."""
        return self.model.head(pooled)

    def _numbers(self, *index: slice) -> Tensor:
        """Values of the source on the model's device, in its dtype."""
        found = self.source.read(*index)
        found = self.values(found) if found.dtype.kind in "iu" else found
        return torch.from_numpy(np.ascontiguousarray(found, np.float64)).to(self.device, self.dtype)

    def _symbols(self, start: int, stop: int, vocabulary: int) -> Tensor:
        found = self.source.read(slice(start, stop))
        if found.size and not 0 <= int(found.min()) <= int(found.max()) < vocabulary:
            wrong = next(int(token) for token in found if not 0 <= int(token) < vocabulary)
            raise DataError(f"{self.source.name} holds the token {wrong}: this model knows 0 to {vocabulary - 1}.")
        return torch.from_numpy(found.astype(np.int64)).to(self.device)[None]

    def _check(self, fits: bool, expected: str) -> None:
        if not fits:
            got = f"{self.source.dtype} of shape {self.source.shape}"
            raise DataError(f"{self.source.name} holds {got}: one sequence for this model is {expected}.")

    def _check_positions(self, positions: nn.Module | None, tokens: int) -> None:
        if positions is not None and tokens > len(positions.weight):
            known = len(positions.weight)
            raise DataError(f"{self.source.name} has {tokens:,} tokens, and this model has an embedding of {known:,} positions alone.")


class SequenceEnds(Ends):
    """Of a ``SequenceClassifier``: a source (L,) of symbols, or (L, channels) of values (or (L,), where channels is 1)."""

    def __init__(self, model: SequenceClassifier, source: Source, values: Values):
        super().__init__(model, source, values)
        self.first_only = model.pooling == "class_token"
        if model.channels is None:
            self._check(len(source.shape) == 1 and source.dtype.kind in "iu", "(L,) of integers")
        else:
            alone = " or (L,)" if model.channels == 1 else ""
            fits = source.shape[1:] == (model.channels,) or (model.channels == 1 and len(source.shape) == 1)
            self._check(fits, f"(L, {model.channels}){alone} of numbers")
        self.before = int(model.class_token is not None)
        self.length = source.shape[0] + self.before
        self._check_positions(model.positions, source.shape[0])

    def embed(self, start: int, stop: int) -> Tensor:
        model = self.model
        first, last = max(0, start - self.before), stop - self.before
        if model.channels is None:
            found = self._symbols(first, last, model.embedding.num_embeddings)
        else:
            found = self._numbers(slice(first, last)).reshape(1, last - first, model.channels)
        x = model.embedding(found)
        if model.positions is not None:
            x = x + model.positions.weight[first:last]
        return model.class_token(x)[0] if self.before and start == 0 else x


class ImageEnds(Ends):
    """Of a ``VisionTransformer``: a source (channels, height, width) of values; a token is a patch."""

    def __init__(self, model: VisionTransformer, source: Source, values: Values):
        super().__init__(model, source, values)
        self.first_only = model.pooling == "class_token"
        size, shape = model.patch_size, source.shape
        fits = len(shape) == 3 and shape[0] == model.channels and all(side % size == 0 for side in shape[1:])
        self._check(fits, f"({model.channels}, height, width), multiples of {size} pixels")
        if model.positions is not None:
            self._check(shape[1:] == model.image_size, f"{(model.channels, *model.image_size)}, as it has positions")
        self.before, self.columns = int(model.class_token is not None), shape[2] // size
        self.length = shape[1] // size * self.columns + self.before

    def embed(self, start: int, stop: int) -> Tensor:
        model, columns = self.model, self.columns
        first, last = max(0, start - self.before), stop - self.before
        top, bottom = first // columns, -(-last // columns)  # rows of patches
        pixels = self._numbers(slice(None), slice(top * model.patch_size, bottom * model.patch_size))
        x = model.patches(pixels[None]).flatten(2).transpose(1, 2)[:, first - top * columns : last - top * columns]
        if self.before and start == 0:
            x = model.class_token(x)[0]
        return x if model.positions is None else x + model.positions.weight[start:stop]


class TextEnds(Ends):
    """Of the models with a ``TextEncoder``: a source (L,) of tokens, the special ones among them; all are of token type 0."""

    def __init__(self, model: nn.Module, source: Source, values: Values):
        super().__init__(model, source, values)
        self.first_only, self.per_token = isinstance(model, TextClassifier), not isinstance(model, TextClassifier)
        self._check(len(source.shape) == 1 and source.dtype.kind in "iu", "(L,) of integers")
        self.length = source.shape[0]
        self._check_positions(model.encoder.positions, self.length)

    def embed(self, start: int, stop: int) -> Tensor:
        encoder = self.model.encoder
        x = encoder.embedding(self._symbols(start, stop, encoder.embedding.num_embeddings))
        if encoder.positions is not None:
            x = x + encoder.positions.weight[start:stop]
        if encoder.token_types is not None:
            x = encoder.token_types(x)
        return encoder.embedding_norm(x).to(self.dtype)

    def last(self, x: Tensor) -> Tensor:
        return self.model.encoder.norm(x)

    def head(self, pooled: Tensor) -> Tensor:
        return self.model.head(self.model.pooler(pooled))

    def logits(self, x: Tensor) -> Tensor:
        """(1, n, width) -> (1, n, vocabulary)."""
        weight = self.model.encoder.embedding.weight
        if isinstance(self.model, MaskedLM):
            return F.linear(self.model.transform(x), weight, self.model.bias)
        return F.linear(x, weight)


ENDS: dict[type, type[Ends]] = {
    SequenceClassifier: SequenceEnds,
    VisionTransformer: ImageEnds,
    MaskedLM: TextEnds,
    TextClassifier: TextEnds,
    CausalLM: TextEnds,
}


def check_streams(model: nn.Module) -> None:
    """Raises ConfigError, with the reason, for a model that cannot run a sequence in chunks with states of fixed size."""
    name, reason = type(model).__name__, None
    if isinstance(model, TwoTowers):
        reason = "it reads pairs of sequences"
    elif type(model) not in ENDS:
        reason = "it is no model of this package"
    if reason is None:
        for layer, block in enumerate(model.blocks):
            if found := obstacle(block):
                reason = f"{type(getattr(block, 'mixer', block)).__name__} in layer {layer}: {found}"
                break
    if reason is not None:
        raise ConfigError(f"this {name} cannot be streamed ({reason}): predict without streaming.")


class Stream:
    """A model's answer to one sequence, whatever its length.

    A layer that reads both directions needs the whole layer before it: it goes through the sequence from the end, then from the beginning.
    Consecutive causal layers (``direction="forward"``) are gone through together, once. Between them lie a layer's activations, (L, width),
    and the outputs of its backward direction, (L, width + heads): in memory, or in files of ``folder``, which leaves memory for one chunk
    and the states, numbers that do not depend on L.

    Args:
        model: in evaluation mode; it is left as it is.
        source: the path of a .npy file, or an array: what the model's class in this file says of it.
        chunk: tokens at a time; no part of the result.
        folder: for temporary files; None: all in memory.
        values: what integers go through where a model takes values; None: as they are.
        done: called after each chunk of each pass.

    Attributes:
        length: tokens that the blocks see, a class token among them.
        steps: how often ``done`` is called at most.
        per_token: whether there are logits for each token.

    Raises:
        ConfigError: the model cannot be streamed, or ``chunk`` is below 1.
        DataError: a source that cannot be read, or that is none for this model.
    """

    def __init__(
        self,
        model: nn.Module,
        source: str | Path | np.ndarray | Tensor,
        *,
        chunk: int = CHUNK,
        folder: Path | None = None,
        values: Values | None = None,
        done: Callable[[], None] = lambda: None,
    ):
        check_streams(model)
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ConfigError(f"chunk={chunk}: give a number of tokens, 1 or more.")
        self._ends = ENDS[type(model)](model, Source(source), values or (lambda found: found))
        self._model, self._chunk, self._make_tape, self._done = model, chunk, tapes(folder), done
        self.length, self.per_token = self._ends.length, self._ends.per_token
        self.steps = passes(model.blocks) * -(-self.length // chunk)

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(start, (1, n, width)) behind the last norm."""
        ends = self._ends
        with torch.no_grad():
            for start, x in outputs(self._model.blocks, ends.embed, self.length, self._chunk, self._make_tape, self._done):
                yield start, ends.last(x)

    @torch.no_grad()
    def answer(self) -> Tensor:
        """Logits (1, classes) of a classifier, on its device."""
        total = None
        for _, x in self._chunks():
            if self._ends.first_only:
                return self._ends.head(x[:, 0])
            part = x.double().sum(1)
            total = part if total is None else total + part
        return self._ends.head((total / self.length).to(self._ends.dtype))

    def logits(self) -> Iterator[Tensor]:
        """Logits (n, vocabulary) of a language model's tokens, chunk by chunk from the first."""
        for _, x in self._chunks():
            with torch.no_grad():
                yield self._ends.logits(x)[0]
