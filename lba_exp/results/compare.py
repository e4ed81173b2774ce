"""Does one form of a model say the same as another? Logits of two forms on the same samples, counted up over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lba_exp.nn.inputs import further_inputs
from lba_exp.results.naming import ONLY

IGNORED_LABEL = -100  # positions with this label do not count, as in torch's cross entropy


@dataclass
class Totals:
    """What a comparison adds up; ``a + b`` joins two sets of samples, ``figures`` reads the result."""

    count: float = 0.0  # samples
    labelled: float = 0.0  # samples with a label
    correct: float = 0.0  # right predictions among them
    near_ties: float = 0.0  # samples whose prediction the tolerance leaves open
    different: float = 0.0  # other predictions among the rest
    squared_error: float = 0.0
    squared_reference: float = 0.0
    max_abs: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        sums = [a + b for a, b in zip(astuple(self)[:-1], astuple(other)[:-1], strict=True)]
        return Totals(*sums, max_abs=_max(self.max_abs, other.max_abs))

    def sums(self) -> list[float]:
        """All that adds up, ``max_abs`` left out: for a sum over ranks."""
        return list(astuple(self)[:-1])

    @classmethod
    def from_sums(cls, sums: Sequence[float], max_abs: float) -> Totals:
        return cls(*sums, max_abs=max_abs)

    @classmethod
    def width(cls) -> int:
        """How many numbers ``sums`` gives."""
        return len(fields(cls)) - 1

    def figures(self) -> dict[str, float | int | None]:
        """``rel``: relative L2 error of all logits; ``max_abs``: their largest difference; ``agreement``: share of equal predictions among
        the samples that are no near tie (None where all are); ``different`` and ``near_ties``: counts; ``accuracy``: share of right
        predictions (None without labels); ``count``: samples."""
        decided = self.count - self.near_ties
        if self.squared_reference > 0 or math.isnan(self.squared_reference):
            rel = math.sqrt(self.squared_error / self.squared_reference)
        else:
            rel = 0.0 if self.squared_error == 0 else math.inf
        return {
            "max_abs": self.max_abs,
            "rel": rel,
            "agreement": 1 - self.different / decided if decided else None,
            "different": int(self.different),
            "near_ties": int(self.near_ties),
            "accuracy": self.correct / self.labelled if self.labelled else None,
            "count": int(self.count),
        }


def compare(reference: Tensor, logits: Tensor, labels: Tensor | None = None, *, tolerance: float = 1e-4) -> Totals:
    """Compare the logits of a form with those of the reference form, in float64.

    A sample is a near tie where an error of relative size ``tolerance`` could swap the reference's two largest logits: their margin is at
    most sqrt(2) * tolerance * (the sample's norm, or the batch's root mean square norm where that is larger). Where logits of
    either form are not finite, the prediction counts as different.

    Args:
        reference, logits: (..., classes), any float dtype; of one class, a number is predicted, which has no accuracy.
        labels: (...) integers; those equal to -100 are left out, with their logits. None: no accuracy.

    Raises:
        ValueError: where the two shapes differ.
    """
    if reference.shape != logits.shape:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, the reference {tuple(reference.shape)}: they must be equal.")
    reference, logits = (x.detach().flatten(0, -2) for x in (reference, logits))
    if labels is not None:
        labels = labels.detach().flatten()
        kept = labels != IGNORED_LABEL
        reference, logits, labels = reference[kept], logits[kept], labels[kept].cpu()
        labels = None if logits.shape[-1] == 1 else labels  # a number is predicted: there is no accuracy
    reference, logits = reference.cpu().double(), logits.cpu().double()
    if not reference.numel():
        return Totals()
    error = logits - reference
    norms = reference.norm(dim=-1)
    norms = torch.maximum(norms, norms.square().mean().sqrt())
    near = torch.zeros_like(norms, dtype=torch.bool)
    if reference.shape[-1] > 1:
        first, second = reference.topk(2, dim=-1).values.unbind(-1)
        near = first - second <= math.sqrt(2) * tolerance * norms
    prediction = logits.argmax(-1)
    finite = (reference.isfinite() & logits.isfinite()).all(-1)
    near &= finite
    same = (prediction == reference.argmax(-1)) & finite
    return Totals(
        count=float(len(error)),
        labelled=0.0 if labels is None else float(len(labels)),
        correct=0.0 if labels is None else float((prediction == labels).sum()),
        near_ties=float(near.sum()),
        different=float((~same & ~near).sum()),
        squared_error=float(error.square().sum()),
        squared_reference=float(reference.square().sum()),
        max_abs=float(error.abs().max()),
    )


def run_form(model: nn.Module, form: str | None, batch: Mapping[str, Any]) -> Tensor:
    """The logits of ``batch`` in one form (None: as the model is); the model's form is as before afterwards.

    Args:
        model: ``model(inputs, padding_mask) -> logits``, with ``set_form(form) -> previous form``.
        batch: ``inputs``, ``padding_mask`` and ``token_types`` where there are any, on the model's device.
    """
    if form is None:
        return model(batch["inputs"], **further_inputs(batch))
    previous = model.set_form(form)
    try:
        return model(batch["inputs"], **further_inputs(batch))
    finally:
        model.set_form(previous)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside, compiled blocks run as they were written; every module's training flag and the states of
    torch's generators as before afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    compiled = any("forward" in vars(module) for module in model.modules())  # hooks inside would not be seen to come and go
    cpu_state, cuda_states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_cuda else []
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, training in flags:
            module.training = training
        torch.set_rng_state(cpu_state)
        if on_cuda:
            torch.cuda.set_rng_state_all(cuda_states)


def evaluate_forms(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    forms: Sequence[str] | None = None,
    *,
    reference: str | None = None,
    device: torch.device | str | None = None,
    context: Callable[[], AbstractContextManager] = nullcontext,
    tolerance: float = 1e-4,
    judges: Callable[[], Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, float | int | None]]:
    """Run every form over the same batches and compare each with the reference form.

    Args:
        model: has ``forms``, ``form`` and ``set_form``; called as ``model(inputs, padding_mask)``. It is left as it was found.
        batches: dicts with ``inputs``, ``labels`` and, where there is padding, ``padding_mask``; read once.
        forms: the forms to run; default: all that the model has.
        reference: the form to compare with; default: the one the model is in. It gets its own figures too.
        device: where to move batches; default: the device of the model's weights.
        context: makes the precision's context, for example ``lambda: torch.autocast("cuda", torch.bfloat16)``. Default: as the weights are.
        tolerance: decides which samples are near ties, see ``compare``.
        judges: makes further metrics for a form, name -> metric with ``update(logits, labels)`` and ``compute()``.

    Returns:
        form -> ``accuracy``, ``agreement``, ``different``, ``near_ties``, ``rel``, ``max_abs``, ``count``, and what ``judges`` say; the
        reference form first. A
        model without forms has the one entry ``"-"``.

    Raises:
        ValueError: for a form that the model does not have.
    """
    if not model.forms:
        reference, forms = ONLY, ()
    reference = reference or model.form
    forms = tuple(model.forms if forms is None else forms)
    for form in (reference, *forms):
        if form not in (*model.forms, model.form, ONLY):
            raise ValueError(f"forms: the model has no form {form!r}, it has {', '.join(model.forms)}.")
    device = device or next(model.parameters()).device
    totals = {form: Totals() for form in dict.fromkeys((reference, *forms))}
    judged = {form: judges() if judges is not None else {} for form in totals}
    with undisturbed(model):
        for batch in batches:
            batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            with context():
                logits = {form: run_form(model, None if form == ONLY else form, batch) for form in totals}
            for form in totals:
                totals[form] += compare(logits[reference], logits[form], batch.get("labels"), tolerance=tolerance)
                for metric in judged[form].values():
                    metric.update(logits[form].cpu(), batch["labels"].cpu())
    further = {form: {name: float(metric.compute()) for name, metric in judged[form].items()} for form in totals}
    return {form: total.figures() | further[form] for form, total in totals.items()}


def _max(a: float, b: float) -> float:
    """The larger one; NaN where either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
