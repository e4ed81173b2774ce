"""The parity check: after each validation, does every form of the model still give the same answers?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lba_exp.callbacks import parity_measure as measure
from lba_exp.callbacks.memory import LiveTensors
from lba_exp.callbacks.parity_totals import FAIL, NOT_COMPARED, PASS, REFERENCE, SKIPPED, Pass, judge, reduce_totals, worst
from lba_exp.devices.sharding import is_sharded, whole
from lba_exp.errors import ConfigError, ParityError
from lba_exp.results.compare import run_form, undisturbed
from lba_exp.results.folder import finite
from lba_exp.results.naming import ONLY

MODES = ("check", "strict")
PREFIXES = {"validation": "parity", "test": "test/parity"}


class Parity(pl.Callback):
    """Runs the forms of ``pl_module.model`` on the trained weights and holds each against the form the run trains in.

    After each validation (the sanity check left out) and on test it takes the first batch, runs every form in the run's own precision
    (recorded as ``native_rel``, with latency and memory) and in float32, and runs the operator alone, layer by layer, against float64. A
    form fails where its float32 logits are further off than ``tolerance``, where a prediction differs that is no near tie, where the
    operator is further off than ``operator_tolerance``, or where any of these is not a number. The reference form fails by its operator.

    A model has ``forms``, ``form``, ``set_form(form) -> previous form`` and is called as ``model(inputs, padding_mask) -> logits``; its
    linear layers have ``operands(x, padding_mask)``, the operator's arguments (a list of them where a layer calls it several times; each
    call is judged). Without forms it is recorded as not applicable. Batches are dicts with ``inputs``, ``labels`` and, where there is
    padding, ``padding_mask``. Training is not disturbed: flags, form, gradients, weights and torch's generators are as before.

    Args:
        mode: ``"check"`` warns once per validation and records; ``"strict"`` raises ``lba_exp.errors.ParityError`` on all ranks.
        tolerance: largest relative L2 error of the float32 logits.
        operator_tolerance: largest relative L2 error of the float32 operator against the float64 definition, over all layers.
        forms: the forms to compare with the one trained in; default: all that the model has on its device, "fused" on a GPU.
        full: logits of the whole validation split instead of its first batch.
        full_test: the same on the test split.
        memory_budget_gib: a form whose estimated working memory is larger is skipped, with the reason on record.

    Attributes:
        history: one entry per validation, see ``Parity.record`` for the figures.
        last: the latest entry, of a validation or a test; None before the first.

    Raises:
        ValueError: for a mode that does not exist.
        lba_exp.errors.ConfigError: at the first validation, for a form that the model does not have.
    """

    def __init__(
        self,
        mode: str = "check",
        tolerance: float = 1e-4,
        operator_tolerance: float = 2e-5,
        forms: Sequence[str] | None = None,
        full: bool = False,
        full_test: bool = True,
        memory_budget_gib: float = 4.0,
    ):
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}: it must be one of {', '.join(MODES)}.")
        self.mode = mode
        self.tolerance = tolerance
        self.operator_tolerance = operator_tolerance
        self.forms = None if forms is None else tuple(forms)
        self.full = {"validation": full, "test": full_test}
        self.memory_budget_gib = memory_budget_gib
        self.history: list[dict[str, Any]] = []
        self.test: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self._stage: str | None = None
        self._batch: dict[str, dict[str, Any]] = {}  # split -> its fixed batch
        self._passed: dict[str, Pass] = {}  # split -> what its batches have added up to
        self._peaks: dict[tuple[str, str], int | None] = {}  # (split, form) -> bytes; they do not depend on the weights
        self._shapes: dict[tuple, list[measure.LayerShape]] = {}  # shape of a sample -> its layers' shapes
        self._whole: nn.Module | None = None  # while a split is measured: a sharded model with all its weights on this device

    # Hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stage = stage

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self._see(trainer, pl_module, "validation", batch, batch_idx, dataloader_idx)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self._see(trainer, pl_module, "test", batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "validation")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage in (None, "fit"):  # the best checkpoint, loaded for the test, knows less than this callback
            self.history = list(state_dict["history"])
            self.last = self.history[-1] if self.history else None

    # Results

    def metrics(self) -> dict[str, float]:
        """The latest figures that are numbers: ``parity/<form>/<figure>``, ``test/parity/<form>/<figure>`` after a test."""
        if self.last is None:
            return {}
        prefix = PREFIXES[self.last["split"]]
        return {
            f"{prefix}/{form}/{name}": float(value)
            for form, figures in self.last["forms"].items()
            for name, value in figures.items()
            if isinstance(value, int | float)
        }

    def record(self) -> dict[str, Any]:
        """The parity part of a run's record: plain types, None where a figure is missing or not finite.

        ``applicable`` False with a ``reason`` and, after a test, latency and memory of the one form; or ``verdict`` ("pass", "fail" where
        any measurement of the run failed, "not compared"), ``forms`` (the figures of the test, or of the last validation: ``split``),
        ``worst`` (the largest ``rel`` of all validations), ``failed`` (which measurements failed, and the sentence), and the settings.
        """
        settings = {name: getattr(self, name) for name in ("mode", "tolerance", "operator_tolerance", "memory_budget_gib")}
        final = self.test or self.last
        if final is None:
            return {"applicable": True, "verdict": NOT_COMPARED, "forms": {}, "worst": None, "failed": [], "validations": 0, **settings}
        if not final["applicable"]:
            kept = {key: final[key] for key in ("split", "precision", "memory_method", "forms") if key in final}
            return finite({"applicable": False, "reason": final["reason"], **kept, **settings})
        entries = [*self.history, *([self.test] if self.test else [])]
        failed = [{key: e[key] for key in ("split", "step", "epoch", "sentence")} for e in entries if e["verdict"] == FAIL]
        compared = any(e["verdict"] == PASS for e in entries)
        figures = {key: final[key] for key in ("split", "reference", "precision", "operator_judge", "memory_method", "forms")}
        return finite(
            {
                "applicable": True,
                "verdict": FAIL if failed else PASS if compared else NOT_COMPARED,
                **figures,
                "worst": worst(self.history),
                "failed": failed,
                "validations": len(self.history),
                **settings,
            }
        )

    # Work

    def _plain(self, pl_module: pl.LightningModule) -> nn.Module | None:
        """The module's model, all of its weights on this device where they fit the budget: forms take different times from device to
        device, and would wait for each other's pieces."""
        model = _model(pl_module)
        if model is None or measure.is_split(model) or not is_sharded(model) or self._over_budget(model):
            return model
        if self._whole is None:
            self._whole = whole(model)
        return self._whole

    def _over_budget(self, model: nn.Module) -> str | None:
        needed = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
        if needed <= self.memory_budget_gib:
            return None
        return f"the sharded weights need {needed:.3g} GiB on one device, more than the budget of {self.memory_budget_gib:g} GiB"

    def _not_applicable(self, model: nn.Module) -> str | None:
        if measure.is_split(model):
            return measure.SPLIT
        if len({*getattr(model, "forms", ()), getattr(model, "form", None)} - {None}) <= 1:
            return "the model has no second form to compare with"
        return self._over_budget(model) if is_sharded(model) else None

    def _see(self, trainer, pl_module, split: str, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int) -> None:
        """Keep the first batch; add up every batch where the whole split is wanted."""
        if trainer.sanity_checking or dataloader_idx != 0 or _model(pl_module) is None:
            return
        if batch_idx == 0:
            self._whole = None  # of other weights
        model = self._plain(pl_module)
        if batch_idx == 0:
            self._passed[split] = Pass()
            if split == "test" or split not in self._batch:
                self._peaks = {key: value for key, value in self._peaks.items() if key[0] != split}
                self._batch[split] = {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
        if self.full[split] and not self._not_applicable(model):
            with undisturbed(model):
                self._exclude_too_large(self._passed[split], model, batch)
                self._add(trainer, model, self._passed[split], batch)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        if trainer.sanity_checking:
            return
        model = self._plain(pl_module)
        entry = {"split": split, "step": trainer.global_step, "epoch": trainer.current_epoch}
        if split == "test":  # on weights that may come from any checkpoint
            entry |= {"step": None, "epoch": None}
        if reason := self._not_applicable(model):
            entry |= {"applicable": False, "reason": reason, "forms": {}, "verdict": NOT_COMPARED, "sentence": None}
            if split == "test" and split in self._batch and not is_sharded(model) and not measure.is_split(model):
                with undisturbed(model):
                    entry |= self._cost(trainer, model, self._batch[split])
        elif split in self._batch:
            with undisturbed(model):
                entry |= self._measure(trainer, model, split)
        else:
            return
        self.last, self._whole = entry, None
        if split == "test":
            self.test = entry
        else:
            self.history.append(entry)
        if entry["verdict"] == FAIL:
            if self.mode == "strict":
                raise ParityError(entry["sentence"])
            rank_zero_warn(entry["sentence"])

    def _cost(self, trainer: pl.Trainer, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Latency and memory of a model without a second form: its one form is named ``"-"``, unless the model names it."""
        context, form = trainer.precision_plugin.forward_context, getattr(model, "form", None)
        _, latency = measure.timed_form(model, form, batch, context)
        figures = {"latency_ms": latency, "peak_bytes": measure.forward_bytes(model, form, batch, context)}
        method = LiveTensors(batch["inputs"].device).method
        return {"precision": str(trainer.precision), "memory_method": method, "forms": {form or ONLY: figures}}

    def _measure(self, trainer: pl.Trainer, model: nn.Module, split: str) -> dict[str, Any]:
        batch, passed, reference = self._batch[split], self._passed[split], model.form
        forms, context = self._all_forms(model), trainer.precision_plugin.forward_context
        self._exclude_too_large(passed, model, batch)
        native, latency = {}, {}
        for form in forms:
            timed = passed.attempt(form, partial(measure.timed_form, model, form, batch, context), required=form == reference)
            if timed is None:
                continue
            native[form], latency[form] = timed
            if (split, form) not in self._peaks:
                self._peaks[split, form] = measure.forward_bytes(model, form, batch, context)
        if not self.full[split]:
            self._add(trainer, model, passed, batch, native)
        shapes = self._layer_shapes(model, batch)
        kept = [form for form in forms if form not in passed.excluded]
        operator, operator_judge = measure.operator_errors(measure.as_float32(model), batch, kept, shapes, self.memory_budget_gib)
        totals, operator, excluded = reduce_totals(trainer, forms, passed, operator)
        figures = {}
        for form in forms:
            if form in excluded:
                figures[form] = dict(zip(("verdict", "reason"), excluded[form], strict=True))
                continue
            exact, own = totals[form][0].figures(), totals[form][1].figures()
            figures[form] = {
                **exact,
                "accuracy": own["accuracy"],
                "native_rel": own["rel"],
                "operator_rel": operator[form],
                "latency_ms": latency[form],
                "peak_bytes": self._peaks[split, form],
            }
            reasons = judge(figures[form], self.tolerance, self.operator_tolerance)
            figures[form]["verdict"] = FAIL if reasons else REFERENCE if form == reference else PASS
            figures[form]["reason"] = ", ".join(reasons) or None
        failing = [f"form {form}: {f['reason']}" for form, f in figures.items() if f["verdict"] == FAIL]
        compared = any(f["verdict"] == PASS for f in figures.values())
        where = "on test" if split == "test" else f"at step {trainer.global_step}"
        return {
            "applicable": True,
            "reference": reference,
            "precision": str(trainer.precision),
            "operator_judge": f"{operator_judge}, float64",
            "memory_method": LiveTensors(batch["inputs"].device).method,
            "forms": figures,
            "verdict": FAIL if failing else PASS if compared else NOT_COMPARED,
            "sentence": f"parity {where}, against the form {reference}: {'; '.join(failing)}." if failing else None,
        }

    def _add(self, trainer, model: nn.Module, passed: Pass, batch: Mapping[str, Any], native: dict[str, Tensor] | None = None) -> None:
        """Run every form on a batch, in the run's precision (unless ``native`` has it) and in float32, and add up the differences."""
        reference, context = model.form, trainer.precision_plugin.forward_context

        def logits_of(which: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
            found = {}
            for form in self._all_forms(model):
                logits = passed.attempt(form, partial(run_form, which, form, batch), required=form == reference)
                if logits is not None:
                    found[form] = logits
            return found

        if native is None:
            with context():
                native = logits_of(model, batch)
        exact = native
        if not (str(trainer.precision) == "32-true" and measure.is_float32(model) and measure.float32_is_exact()):
            with measure.exact_float32():
                exact = logits_of(measure.as_float32(model), measure.cast_batch(batch, torch.float32))
        passed.add(reference, native, exact, batch.get("labels"), self.tolerance)

    def _all_forms(self, model: nn.Module) -> list[str]:
        """The reference form, then the others, the recurrent one first."""
        for form in self.forms or ():
            if form not in model.forms:
                raise ConfigError(f"parity: the model has no form {form!r}, it has {', '.join(model.forms)}.")
        others = [form for form in (self.forms or model.forms) if form != model.form]
        return [model.form, *sorted(others, key=lambda form: form != "recurrent")]

    def _layer_shapes(self, model: nn.Module, batch: Mapping[str, Any]) -> list[measure.LayerShape]:
        key = tuple(batch["inputs"].shape[1:])
        if key not in self._shapes:
            self._shapes[key] = measure.layer_shapes(measure.as_float32(model), measure.cast_batch(batch, torch.float32))
        return self._shapes[key]

    def _exclude_too_large(self, passed: Pass, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Skip the forms that do not fit the budget; the form trained in has run already."""
        shapes, samples = self._layer_shapes(model, batch), len(batch["inputs"])
        for form in self._all_forms(model)[1:]:
            if reason := measure.over_budget(form, samples, shapes, self.memory_budget_gib):
                passed.excluded.setdefault(form, (SKIPPED, reason))


def _model(pl_module: pl.LightningModule) -> nn.Module | None:
    """The module's model; a compiled one without its wrapper, whose graphs belong to one form."""
    model = getattr(pl_module, "model", None)
    return getattr(model, "_orig_mod", model)
