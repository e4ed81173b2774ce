"""Do all forms of a trained model say the same of these inputs? In float32 with exact products, as the parity check of a run does it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lba_exp.callbacks.parity_measure import as_float32, cast_batch, exact_float32, layer_shapes, over_budget
from lba_exp.errors import ConfigError
from lba_exp.inference.predictor import AUTO, Predictor, check_tokens
from lba_exp.results.compare import IGNORED_LABEL, Totals, compare, run_form, undisturbed

STREAMED = "streamed"
TOLERANCE = 1e-4  # of a run's parity check (``parity.tolerance``), which decides what is a near tie
BUDGET_GIB = 4.0  # and of a run (``parity.memory_budget_gib``)


class Verification:
    """Compares every form of a model with the one that predicts, batch by batch.

    A form whose estimated working memory exceeds 4 GiB is left out for that batch, and named in ``skipped``.

    Args:
        predictor: its form is the reference.
        streamed: the reference is what a stream gave, and every form is compared with it.

    Attributes:
        reference: name of the reference.
        skipped: form -> why it was not run on all inputs.

    Raises:
        ConfigError: the model has one form only.
    """

    def __init__(self, predictor: Predictor, *, streamed: bool = False):
        forms = predictor.forms
        self.reference = STREAMED if streamed else (predictor.form or "")
        if len(forms) < 2 and not streamed:
            raise ConfigError(f"the model in {predictor.path} computes in one form only: there is nothing to verify.")
        self.forms = tuple(form for form in forms if form != self.reference)
        self._number, self._per_token = predictor.number, predictor.per_token
        self._device, self._model = predictor.device, as_float32(predictor.model)
        self._totals = {form: Totals() for form in self.forms}
        self._shapes: tuple[torch.Size, list] | None = None
        self.skipped: dict[str, str] = {}

    def add(self, batch: Mapping[str, Tensor], reference: Tensor | None = None) -> None:
        """Runs all forms on a batch of ``Predictor.batches``; ``reference``: the logits that a stream gave for it."""
        check_tokens(self._model, batch)
        moved = cast_batch({name: value.to(self._device) for name, value in batch.items()}, torch.float32)
        with undisturbed(self._model), exact_float32():
            expected = reference if reference is not None else run_form(self._model, self._model.form, moved)
            kept = self._kept(batch, expected)
            for form in self.forms:
                if (reason := self._too_large(form, moved)) is not None:
                    self.skipped[form] = reason
                    continue
                found = run_form(self._model, form, moved)
                self._totals[form] += compare(expected, found, kept, tolerance=TOLERANCE)

    def _kept(self, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
        """Labels that leave padded tokens out, where each token has logits."""
        mask = batch.get("padding_mask")
        if mask is None or not self._per_token:
            return None
        return torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device).masked_fill(~mask.to(logits.device), IGNORED_LABEL)

    def _too_large(self, form: str, batch: Mapping[str, Tensor]) -> str | None:
        inputs = batch["inputs"]
        if self._shapes is None or self._shapes[0] != inputs.shape[1:]:
            before = self._model.form
            self._model.set_form(AUTO)
            try:
                self._shapes = inputs.shape[1:], layer_shapes(self._model, batch)
            finally:
                self._model.set_form(before)
        return over_budget(form, len(inputs), self._shapes[1], BUDGET_GIB)

    def figures(self) -> dict[str, dict[str, float | int | None]]:
        """form -> ``count``, ``different``, ``near_ties``, ``rel`` (relative L2 error of all logits), ``max_abs``; those that ran."""
        return {form: total.figures() for form, total in self._totals.items() if total.count}

    def differing(self) -> dict[str, int]:
        """form -> predictions that are others than the reference's, near ties left out, for the forms that have some. Logits that are not
        finite count, and so do, where a number is predicted, all numbers of a form whose error exceeds the tolerance."""
        found = {}
        for form, figures in self.figures().items():
            off = self._number and not figures["rel"] <= TOLERANCE  # so that NaN counts
            found[form] = figures["count"] if off else figures["different"]
        return {form: number for form, number in found.items() if number}

    @property
    def largest_error(self) -> float:
        """The largest relative error of a form's logits; NaN where some are none."""
        errors = [figures["rel"] for figures in self.figures().values()]
        return math.nan if any(math.isnan(error) for error in errors) else max(errors, default=0.0)
