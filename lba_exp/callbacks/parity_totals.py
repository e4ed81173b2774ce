"""What the parity callback adds up over batches and ranks, its verdict, and what of it goes on record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lba_exp.results.compare import Totals, compare

SKIPPED, FAIL, PASS, REFERENCE, NOT_COMPARED = "skipped", "fail", "pass", "reference", "not compared"  # verdicts


class Pass:
    """What the batches of a split add up to.

    Attributes:
        totals: form -> totals in float32, totals in the run's precision.
        excluded: form without figures -> its verdict (skipped or fail), and why.
    """

    def __init__(self):
        self.totals: dict[str, tuple[Totals, Totals]] = {}
        self.excluded: dict[str, tuple[str, str]] = {}

    def attempt(self, form: str, run: Callable[[], Any], *, required: bool) -> Any:
        """What ``run`` returns; None where the form is excluded, or where it raises and is therefore excluded from now on."""
        if form in self.excluded:
            return None
        try:
            return run()
        except Exception as error:
            if required:  # the form trained in: the run itself is broken
                raise
            self.excluded[form] = (FAIL, f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
            return None

    def add(self, reference: str, native: dict[str, Tensor], exact: dict[str, Tensor], labels: Tensor | None, tolerance: float) -> None:
        for form in exact:
            before = self.totals.get(form, (Totals(), Totals()))
            self.totals[form] = (
                before[0] + compare(exact[reference], exact[form], labels, tolerance=tolerance),
                before[1] + compare(native[reference], native[form], labels, tolerance=tolerance),
            )


def reduce_totals(
    trainer: pl.Trainer, forms: list[str], passed: Pass, operator: dict[str, float]
) -> tuple[dict[str, tuple[Totals, Totals]], dict[str, float], dict[str, tuple[str, str]]]:
    """Totals, operator errors and the excluded forms over all ranks; the same on every rank, but for the wording of reasons."""
    totals = {form: passed.totals.get(form, (Totals(), Totals())) for form in forms}
    operator = {form: operator.get(form, 0.0) for form in forms}
    excluded = dict(passed.excluded)
    if trainer.world_size == 1:
        return totals, operator, excluded
    levels = {form: (0.0, SKIPPED, FAIL).index(excluded.get(form, (0.0,))[0]) for form in forms}
    sums = [x for form in forms for part in totals[form] for x in part.sums()]
    largest = [x for form in forms for x in (*(part.max_abs for part in totals[form]), operator[form], float(levels[form]))]
    largest = [math.inf if math.isnan(x) else x for x in largest]  # a maximum over ranks can lose a NaN
    device = trainer.strategy.root_device
    sums = trainer.strategy.reduce(torch.tensor(sums, dtype=torch.float64, device=device), reduce_op="sum").tolist()
    largest = trainer.strategy.reduce(torch.tensor(largest, dtype=torch.float64, device=device), reduce_op="max").tolist()
    width = Totals.width()
    for i, form in enumerate(forms):
        exact, own, operator[form], level = largest[4 * i : 4 * i + 4]
        at = 2 * width * i
        totals[form] = (Totals.from_sums(sums[at : at + width], exact), Totals.from_sums(sums[at + width : at + 2 * width], own))
        if level > levels[form]:
            excluded[form] = (SKIPPED, "skipped on another rank") if level == 1 else (FAIL, "raised an error on another rank")
    return totals, operator, excluded


def judge(figures: Mapping[str, Any], tolerance: float, operator_tolerance: float) -> list[str]:
    """What is wrong with a form's figures, in words; an empty list where nothing is. NaN is wrong."""
    reasons = []
    if not figures["rel"] <= tolerance:
        reasons.append(f"relative error {figures['rel']:.2g} of the float32 logits exceeds {tolerance:g}")
    if figures["different"]:
        reasons.append(f"{figures['different']} of {figures['count']} predictions differ ({figures['near_ties']} near ties left out)")
    if not figures["operator_rel"] <= operator_tolerance:
        reasons.append(f"relative error {figures['operator_rel']:.2g} of the operator exceeds {operator_tolerance:g}")
    return reasons


def worst(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The validation and form with the largest relative error; one that is not a number is the worst."""
    found = [
        {"step": entry["step"], "epoch": entry["epoch"], "form": form, "rel": figures["rel"]}
        for entry in history
        for form, figures in entry["forms"].items()
        if "rel" in figures and form != entry["reference"]
    ]
    return max(found, key=lambda f: f["rel"] if math.isfinite(f["rel"]) else math.inf, default=None)
