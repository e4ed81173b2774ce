"""Evaluate a finished run: another form, another split, other data. The run's folder is only read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from lba_exp import build, composing, messages
from lba_exp.callbacks.checkpoints import BEST, load_checkpoint
from lba_exp.checks import check
from lba_exp.config import run_schema
from lba_exp.errors import ConfigError
from lba_exp.results.compare import evaluate_forms
from lba_exp.results.folder import read_config, read_record
from lba_exp.results.naming import ONLY
from lba_exp.running import threads
from lba_exp.tasks.metrics import CLASS_METRICS, NUMBER_METRICS, split_metrics

SPLITS = ("train", "validation", "test")
CHANGEABLE = ("data", "model.mixer.form", "model.mixer.chunk_size", "threads", "plugins")


def configuration(folder: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """A run's resolved configuration with overrides of what may change without retraining.

    Raises:
        RunFolderError: the folder holds no run. ConfigError: an override that is wrong, or that would need another training.
    """
    stored = read_config(folder)
    schema = run_schema()
    for override in composing.parse(overrides):
        key = override.key_or_group
        if key in composing.GROUPS or override.is_sweep_override() or override.is_delete():
            raise ConfigError(f"{override.input_line!r}: an evaluation takes single keys, such as data.source=FOLDER.")
        messages.check_key(key, schema)
        if not any(key == c or key.startswith(c + ".") for c in CHANGEABLE):
            raise ConfigError(f"{key} is part of what was trained: an evaluation can change {', '.join(CHANGEABLE)}.")
        OmegaConf.update(stored, key, override.value(), force_add=True)
    stored.resume, stored.init_from = "auto", None  # where the weights once came from need not be there any more
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(stored, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(messages.from_hydra(error, schema, composing.GLOBAL_GROUPS)) from None
    composing.import_plugins(cfg.plugins)
    check(cfg)
    return cfg


def load_model(folder: Path, cfg: DictConfig, data: Any, checkpoint: dict[str, Any]) -> torch.nn.Module:
    """The run's model with the weights of a checkpoint, in evaluation mode on the CPU; ``data`` then normalises as the run's did."""
    task = build.task(cfg, data.spec)
    if (kept := checkpoint.get(type(data).__qualname__)) is not None:
        data.adopt(kept)
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the weights of {folder} do not fit data {cfg.data.source!r} ({reason}): use data of the same length and classes."
        ) from None
    return task.model.eval()


def evaluate(
    run: str | Path, overrides: Sequence[str] = (), *, split: str = "test", form: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Accuracy of a finished run's best checkpoint in float32, form by form, and each form's distance to the form it was trained in.

    Args:
        run: the run folder.
        overrides: ``data.*``, ``model.mixer.form``, ``model.mixer.chunk_size``, ``threads``.
        split: train, validation or test; inputs are normalised by the statistics of the run's own training split, whatever the data.
        form: one form, beside the reference; default: all.
        quiet: print nothing.
    Returns:
        ``{"run", "status", "step", "split", "data", "reference", "forms": {form: figures}}`` with the run's status ("unfinished" where it
        has no record), the step of the checkpoint, and the figures accuracy, agreement, different, near_ties, rel, max_abs, count and the
        other metrics of the data (f1, matthews, pearson, spearman); a model without forms has one entry, ``"-"``.
    Raises:
        UserError: a wrong folder, key, split, form, data set or checkpoint.
    """
    folder = Path(run).expanduser()
    cfg = configuration(folder, overrides)
    if split not in SPLITS:
        raise ConfigError(f"split={split}: {messages.unknown(split, SPLITS, 'a split')}")
    with threads(cfg.threads):
        return _evaluate(folder, cfg, split, form, Console(quiet=quiet, width=None if sys.stdout.isatty() else 110))


def _evaluate(folder: Path, cfg: DictConfig, split: str, form: str | None, console: Console) -> dict[str, Any]:
    checkpoint = load_checkpoint(folder / "checkpoints" / BEST)
    data = build.data_module(cfg)
    model = load_model(folder, cfg, data, checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    model.to(device)
    if form is not None and form not in model.forms:
        only = "" if model.forms else " Softmax attention is one form: leave form= out."
        raise ConfigError(f"form={form}: {messages.unknown(form, model.forms, 'a form of this model')}{only}")
    if model.form == "fused" and "fused" not in model.forms:
        raise ConfigError(f"model.mixer.form=fused of {folder} does not run on {device}: give model.mixer.form=chunkwise.")
    batches = data.split_loader(split)
    names = tuple(name for name in data.spec.metrics if name != "accuracy")
    figures = evaluate_forms(
        model,
        batches,
        (form,) if form else None,
        device=device,
        tolerance=cfg.parity.tolerance,
        judges=lambda: {name: split_metrics(data.spec.metrics, data.spec.classes)[name] for name in names},
    )
    reference = model.form if model.forms else ONLY
    status, step = (read_record(folder) or {"status": "unfinished"})["status"], checkpoint["global_step"]
    result = {"run": str(folder), "status": status, "step": step, "split": split, "data": cfg.data.source}
    result |= {"reference": reference, "forms": figures}
    _show(result, console)
    return result


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{result['run']}: {result['split']} split of {result['data']}")
    metrics = [name for name in (*CLASS_METRICS, *NUMBER_METRICS) if any(f.get(name) is not None for f in result["forms"].values())]
    for column in ("form", "samples", *metrics, "other predictions", "near ties", "relative error"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for form, f in result["forms"].items():
        label = f"{form} (reference)" if form == result["reference"] and len(result["forms"]) > 1 else form
        distance = [str(f.get("different", "")), str(f.get("near_ties", "")), f"{f['rel']:.1e}" if "rel" in f else ""]
        judged = [f"{100 * f[name]:.2f} %" if name == "accuracy" else f"{f[name]:.4f}" for name in metrics]
        table.add_row(label, str(f["count"]), *judged, *distance)
    console.print(table)
    if result["status"] != "finished":
        console.print(f"This run is {result['status']}: the weights are its best so far, of step {result['step']:,}.", highlight=False)
