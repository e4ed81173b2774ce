"""The W&B run of a job: opened, given what is to be looked at, and closed on every path."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from lba_exp.callbacks.samples import Sample
from lba_exp.errors import ConfigError
from lba_exp.results import naming
from lba_exp.results.collect import flatten
from lba_exp.results.folder import finite

# columns of the table of forms, beside the form's name
FIGURES = (
    *("accuracy", "agreement", "rel", "max_abs", "native_rel", "operator_rel"),
    *("latency_ms", "peak_bytes", "verdict", "reason"),
)
SMALLEST = 96  # pixels: smaller pictures are shown in whole multiples of their size


def begin(cfg: DictConfig, folder: Path) -> Any:
    """Opens the W&B run of a job. Its id is kept in the folder, so that a resumed run continues it; an agent's trial has the agent's.

    Raises:
        ConfigError: another W&B run is open in this process, or W&B does not start.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # before the import: some of its remarks heed nothing else
    import wandb

    if wandb.run is not None:
        raise ConfigError("a W&B run is open in this process: finish it first (wandb.finish()), or give logger=csv.")
    identity = folder / "wandb_id"
    if not identity.is_file():
        identity.write_text(cfg.origin.trial or uuid.uuid4().hex[:8])
    plain = OmegaConf.to_container(cfg, resolve=True)
    where = {"id": identity.read_text().strip(), "project": cfg.logger.project, "entity": cfg.logger.entity}
    try:
        run = wandb.init(
            name=f"{naming.name(cfg)}-seed{cfg.seed}",
            dir=folder,
            mode=cfg.logger.wandb,
            resume="allow",
            group=naming.group(cfg),
            job_type="train",
            tags=list(dict.fromkeys([cfg.model.name, naming.data_name(cfg), *cfg.logger.tags])),
            config=plain,
            settings=wandb.Settings(silent=True, console="off"),
            **({} if cfg.origin.trial else where),  # the agent has told W&B where its trials go
        )
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"logger: W&B does not start ({reason}): run `wandb login`, or give logger=wandb_offline or csv.") from None
    # a sweep's parameter that is called like a group (model) takes its place: its keys then stand beside it, with dots
    if hidden := {k: v for k, v in plain.items() if isinstance(v, dict) and not isinstance(run.config[k], Mapping)}:
        run.config.update(flatten(hidden, "."))
    return run


def finish(record: dict[str, Any], samples: Sequence[Sample], figure: Path, code: int) -> None:
    """Hands over what a run leaves, and closes its W&B run, whatever happens: an open one would take the next run's numbers.

    Args:
        record: the run's, as in result.json; it becomes the summary's ``record``.
        samples: predictions to look at.
        figure: the picture of the run's curves; left out where there is no such file.
        code: the run's exit code.
    """
    import wandb

    if wandb.run is None:
        return
    try:
        for key, value in record.get("metrics", {}).get("test", {}).items():
            wandb.run.summary[f"test/{key}"] = value
        wandb.run.summary["record"] = finite({k: v for k, v in record.items() if k != "folder"})
        if media := _media(record, samples, figure):
            wandb.run.log(media)
    finally:
        wandb.finish(exit_code=code)


def _media(record: Mapping[str, Any], samples: Sequence[Sample], figure: Path) -> dict[str, Any]:
    """``run``: the curves; ``forms``: the parity check's figures, a row a form; ``samples``: pictures, or a table of texts."""
    import wandb

    found: dict[str, Any] = {}
    if figure.is_file():
        found["run"] = wandb.Image(str(figure))
    if forms := finite((record.get("parity") or {}).get("forms") or {}):
        rows = [[form, *(figures.get(key) for key in FIGURES)] for form, figures in forms.items()]
        found["forms"] = wandb.Table(columns=["form", *FIGURES], data=rows)
    if samples and isinstance(samples[0].shown, np.ndarray):
        found["samples"] = [
            wandb.Image(_enlarged(s.shown), caption=f"label {s.label}, predicted {s.prediction} ({s.probability:.2f})") for s in samples
        ]
    elif samples and samples[0].position is None:
        rows = [[" ".join(s.shown), s.prediction, s.label, s.correct, s.probability] for s in samples]
        found["samples"] = wandb.Table(columns=["text", "prediction", "label", "correct", "probability"], data=rows)
    elif samples:
        rows = [[" ".join(s.shown), s.position, s.shown[s.position], s.prediction, s.label, s.correct, s.probability] for s in samples]
        columns = ["text", "position", "input", "prediction", "label", "correct", "probability"]
        found["samples"] = wandb.Table(columns=columns, data=rows)
    return found


def _enlarged(picture: np.ndarray) -> np.ndarray:
    times = max(1, SMALLEST // max(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)
