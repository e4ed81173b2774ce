"""Predictions of a trained model, of inputs as they come, in any of its forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lba_exp.errors import ConfigError, DataError, UserError, whose_memory
from lba_exp.inference.kinds import preparation
from lba_exp.inference.loading import Trained, device_of, read
from lba_exp.inference.preparing import Batch, Preparation
from lba_exp.inference.streaming import CHUNK, Stream
from lba_exp.inference.texts import MASK
from lba_exp.messages import unknown
from lba_exp.models.language import CausalLM, MaskedLM
from lba_exp.nn.inputs import OPTIONAL, further_inputs

AUTO = "auto"
BATCH = 64
TOP = 5


@dataclass(frozen=True)
class Prediction:
    """What a model says of N inputs.

    Attributes:
        logits: float32 (float64 of a float64 model) on the CPU: (N, classes), or, of a language model, (N, L, vocabulary).
        class_names: of the last dimension: the classes, or the vocabulary's tokens.
        number: the model predicts a number, ``logits[:, 0]``, and no class.
        padding_mask: (N, L) bool, True at real tokens, of a language model; else None.
    """

    logits: Tensor
    class_names: Sequence[str]
    number: bool = False
    padding_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def probabilities(self) -> Tensor:
        """Of the shape of ``logits``; they sum to 1 over the last dimension. ValueError where a number is predicted."""
        if self.number:
            raise ValueError("probabilities: this model predicts a number, logits[:, 0], and has none")
        return self.logits.softmax(-1)

    @property
    def classes(self) -> Tensor:
        """The most probable class (N,), or token (N, L): int64."""
        return self.logits.argmax(-1)

    @property
    def labels(self) -> list[str]:
        """The names of the predicted classes of a classifier."""
        return [self.class_names[number] for number in self.classes.tolist()]


@dataclass(frozen=True)
class Guess:
    """The tokens that a language model finds most probable at a position of its input, with their probabilities, the best first."""

    position: int
    tokens: list[tuple[str, float]]


class Predictor:
    """A trained model with all that its inputs need; made by ``load``.

    Attributes:
        path: what it was read from.
        trained: the model, and what was kept of its data.
        preparation: what raw inputs go through; it counts the texts that were ``cut``.
        device: where the model is.
        class_names: the classes, or, of a language model, the tokens.
        per_token: whether it gives logits for each token (language models).
    """

    def __init__(self, trained: Trained, *, device: str | torch.device = AUTO, form: str = AUTO, vocabulary: str | Path | None = None):
        self.trained, self.path, self.device = trained, trained.path, device_of(device)
        self.preparation: Preparation = preparation(trained, vocabulary)
        self._model = trained.model.to(self.device).eval()
        self.per_token = isinstance(self._model, MaskedLM | CausalLM)
        config, data = getattr(self._model, "config", None) or {}, self.preparation.data
        classes, names = config.get("classes"), self.preparation.class_names
        if not self.per_token and names is not None and classes is not None and len(names) != classes:
            raise DataError(f"{self.path} has a model of {classes} classes, and names {len(names)}: its parts belong to different runs.")
        if names is None and (classes is None or self.per_token):
            raise DataError(f"{self.path} does not say how many classes its model has: it was not written by this package.")
        self.number = not self.per_token and (classes == 1 or (data is not None and data.get("target") == "number"))
        self.class_names: list[str] = names if names is not None else [str(number) for number in range(classes)]
        if vocabulary is not None:
            if not hasattr(type(self.preparation), "words"):
                raise ConfigError(f"vocabulary={vocabulary}: the model in {self.path} reads no texts: leave it out.")
            _ = self.preparation.words  # a wrong one is met at once
        self.form = form

    @property
    def model(self) -> nn.Module:
        """The model itself, in evaluation mode: ``model(inputs, padding_mask) -> logits``."""
        return self._model

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that the model has where it is; empty for softmax attention."""
        return tuple(getattr(self._model, "forms", ()))

    @property
    def form(self) -> str | None:
        """The form that predicts: one of ``forms``, or "auto", the fastest one for each length; None for a model without forms.

        Setting another one raises ConfigError.
        """
        return getattr(self._model, "form", None)

    @form.setter
    def form(self, form: str) -> None:
        forms = self.forms
        if form == AUTO and len(forms) < 2:
            form = forms[0] if forms else None
        elif form != AUTO and form not in forms:
            raise ConfigError(f"form={form}: {self._no_form(form)}")
        if form is not None:
            self._model.set_form(form)

    def _no_form(self, form: str) -> str:
        if not self.forms:
            return "this model has no forms to choose from: leave form out, or give auto."
        weight = next(self._model.parameters())
        if form == "fused":
            for mixer in self._model.mixers:
                if hasattr(mixer, "fused_obstacle") and (reason := mixer.fused_obstacle(weight.device, weight.dtype)):
                    return f"{reason.removeprefix('form: ').rstrip('.')}."
        return unknown(str(form), (*self.forms, AUTO), "a form of this model")

    @property
    def cut(self) -> int:
        """Texts that were longer than the model's inputs, and were cut, so far."""
        return self.preparation.cut

    def batches(self, inputs: Any, batch_size: int = BATCH) -> Iterator[Batch]:
        """Inputs as the model gets them, in batches on the CPU; ``inputs`` and errors as of ``predict``."""
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: give 1 or more.")
        if not isinstance(inputs, Mapping | Tensor | np.ndarray):
            alone = isinstance(inputs, str | Path) or not isinstance(inputs, Sequence)
            found = [inputs] if alone else inputs
            for start in range(0, len(found), batch_size):
                yield self.preparation.items(found[start : start + batch_size])
            return
        given = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
        given = {name: given[name] for name in ("inputs", *FURTHER) if given.get(name) is not None}
        if not all(isinstance(array, Tensor | np.ndarray) and array.ndim for array in given.values()) or "inputs" not in given:
            raise DataError(f"a batch is arrays called inputs and perhaps {' and '.join(FURTHER)}, and this has {', '.join(given)}.")
        array = given.pop("inputs")
        size = len(array) if not self.preparation.is_one(array) else 0
        if not size and not self.preparation.is_one(array):
            raise DataError("there are no inputs: give one at least.")
        for name, further in given.items():
            if len(further) != len(array):
                raise DataError(f"{name} has the shape {tuple(further.shape)}, which does not go with inputs of {tuple(array.shape)}.")
        if not size:
            yield self.preparation.arrays(array, **given)
        for start in range(0, size, batch_size):
            part = slice(start, start + batch_size)
            yield self.preparation.arrays(array[part], **{name: further[part] for name, further in given.items()})

    def logits(self, batch: Mapping[str, Tensor], selected: Tensor | None = None) -> Tensor:
        """Logits of a batch of ``batches``, on the CPU, in at least float32; at ``selected`` (B, L) positions alone, (n, vocabulary), where
        a language model is asked.

        Raises:
            DataError: inputs of another shape or dtype, or with tokens that the model does not know.
            UserError: the device's memory is too small.
        """
        check_tokens(self._model, batch)
        moved = {name: value.to(self.device) for name, value in batch.items()}
        further = further_inputs(moved) | ({} if selected is None else {"selected": selected.to(self.device)})
        try:
            with torch.no_grad():
                found = self._model(moved["inputs"], **further)
        except ValueError as error:
            raise DataError(f"the inputs do not fit the model in {self.path}: {str(error).rstrip('.')}.") from None
        except RuntimeError as error:
            if whose_memory(error):
                raise UserError("memory is too small for so many inputs at once: give a smaller batch, or another form.") from None
            raise
        return found.detach().to("cpu", torch.promote_types(found.dtype, torch.float32))

    def predict(self, inputs: Any, *, batch_size: int = BATCH) -> Prediction:
        """What the model says of some inputs.

        Args:
            inputs: raw ones, a list or one alone: images (paths, Pillow's, or uint8 arrays (height, width[, 3])), texts, pairs of texts
                (tuples), sequences of token numbers (integer arrays (n,)); they go through what the run's data went through. Or what the
                model gets: an array or tensor (see ``Preparation.arrays``), or a mapping with ``inputs`` and perhaps ``padding_mask`` and
                ``token_types``.
            batch_size: inputs at a time.

        Raises:
            lba_exp.errors.UserError: inputs that are none of this model's, or that cannot be read.
        """
        logits, masks = [], []
        for batch in self.batches(inputs, batch_size):
            logits.append(self.logits(batch))
            if self.per_token:
                mask = batch.get("padding_mask")
                masks.append(torch.ones(logits[-1].shape[:2], dtype=torch.bool) if mask is None else mask)
        if not logits:
            raise DataError("there are no inputs: give one at least.")
        if not self.per_token:
            return Prediction(torch.cat(logits), self.class_names, self.number)
        length = max(found.shape[1] for found in logits)
        whole = torch.cat([nn.functional.pad(found, (0, 0, 0, length - found.shape[1])) for found in logits])
        mask = torch.cat([nn.functional.pad(found, (0, length - found.shape[1])) for found in masks])
        return Prediction(whole, self.class_names, padding_mask=mask)

    def top_tokens(self, batch: Mapping[str, Tensor], top: int = TOP) -> list[list[Guess]]:
        """For each input of a batch of ``batches``, what a language model puts at its [MASK]s; a causal one, behind its last token.

        Raises:
            DataError: the model is no language model, or the number of [MASK] is not known.
        """
        if not self.per_token:
            raise DataError(f"the model in {self.path} is no language model, and predicts no tokens.")
        inputs = batch["inputs"]
        mask = batch.get("padding_mask")
        real = torch.ones_like(inputs, dtype=torch.bool) if mask is None else mask
        if isinstance(self._model, MaskedLM):
            selected = (inputs == self.preparation.words.ids[MASK]) & real
        else:
            selected = real & (real.flip(1).cumsum(1).flip(1) == 1)
        found: list[list[Guess]] = [[] for _ in range(len(inputs))]
        best = self.logits(batch, selected).softmax(-1).topk(min(top, len(self.class_names)))
        for (row, position), values, tokens in zip(selected.nonzero().tolist(), *(x.tolist() for x in best), strict=True):
            found[row].append(Guess(position, [(self.class_names[token], value) for token, value in zip(tokens, values, strict=True)]))
        return found

    def stream(
        self,
        source: str | Path | np.ndarray | Tensor,
        *,
        chunk: int = CHUNK,
        on_disk: bool = False,
        folder: str | Path | None = None,
        done: Callable[[], None] = lambda: None,
    ) -> Stream:
        """One sequence that need not fit into memory: ``stream(source).answer()`` gives a classifier's logits (1, classes), and
        ``stream(source).logits()`` those of a language model, chunk by chunk.

        Args:
            source: a .npy file, read in chunks, or an array: (L,) token numbers, as the model gets them, (L, channels) values, or an image
                (channels, height, width). Floating numbers are taken as they are, already normalised; uint8 are pixels of a sequence.
            chunk: tokens at a time.
            on_disk: keep activations in temporary files, so that memory does not grow with L.
            folder: of those files; None: the system's.
            done: called after each chunk of each pass; ``Stream.steps`` says how often.

        Raises:
            lba_exp.errors.UserError: see ``Stream``.
        """
        where = Path(folder or gettempdir()) if on_disk or folder is not None else None
        return Stream(self._model, source, chunk=chunk, folder=where, values=self.preparation.values, done=done)


FURTHER = ("padding_mask", *OPTIONAL)


def check_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Raises DataError for a token at a real position that a model of symbols does not know."""
    embedding = getattr(getattr(model, "encoder", model), "embedding", None)
    inputs, mask = batch["inputs"], batch.get("padding_mask")
    if not isinstance(embedding, nn.Embedding) or inputs.is_floating_point() or inputs.dtype == torch.bool or not inputs.numel():
        return
    wrong = (inputs < 0) | (inputs >= embedding.num_embeddings)
    if mask is not None and mask.shape == wrong.shape:
        wrong &= mask
    types, known = batch.get("token_types"), getattr(getattr(model, "encoder", model), "token_types", None)
    if types is not None and known is not None and types.numel() and not 0 <= int(types.min()) <= int(types.max()) < len(known.weight):
        raise DataError(f"token_types hold {int(types.min())} to {int(types.max())}: this model knows 0 to {len(known.weight) - 1}.")
    if wrong.any():
        raise DataError(f"the inputs hold the token {int(inputs[wrong][0])}: this model knows 0 to {embedding.num_embeddings - 1}.")


def load(source: str | Path, *, device: str | torch.device = AUTO, form: str = AUTO, vocabulary: str | Path | None = None) -> Predictor:
    """A trained model, ready to predict.

    Args:
        source: a run folder (its best checkpoint is taken), a checkpoint, or a folder that ``save_pretrained`` wrote (``lba-convert``
            writes such, too), which takes arrays alone: of its training data it keeps nothing.
        device: "cpu", "cuda", or "auto", a GPU where there is one.
        form: the form to compute in; "auto": the fastest for each length (``lba_exp.ops.choose_form``).
        vocabulary: the file of the vocabulary that the model was trained with, where the run's own is not there any more, or for the model
            folder of a language model.

    Raises:
        lba_exp.errors.UserError: nothing there, a file that cannot be read, another device, form or vocabulary.
    """
    return Predictor(read(source), device=device, form=form, vocabulary=vocabulary)
