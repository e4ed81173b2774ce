"""The name, group and folder of a run, from its configuration alone."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

# Overrides that never tell two runs apart by name: shown elsewhere in the path, or without influence on what is computed.
NEUTRAL = ("model", "seed", "name", "root", "folder", "resume", "experiments", "sweeps", "logger", "trainer.enable_progress_bar")
# Keys in which a run that goes on may differ from the run that was begun.
FREE = ("root", "folder", "resume", "logger", "origin")
# Where data.global_batch_size is given, on how many devices, and in which pieces, it is computed makes no other run.
DEVICES = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accumulate_grad_batches",
    "data.batch_size",
    "sequence_parallel_size",
)
LONGEST = 100
ONLY = "-"  # in tables and records, the form of a model that has no forms


def data_name(cfg: DictConfig) -> str:
    """``data.name``, or the last part of ``data.source``."""
    return cfg.data.name or Path(cfg.data.source.partition(":")[0]).expanduser().name or "data"


def group(cfg: DictConfig) -> str:
    """The sweep, else the experiment, else the data set."""
    return cfg.origin.sweep or cfg.origin.experiment or data_name(cfg)


def name(cfg: DictConfig) -> str:
    """``name=``, or the variant (in a sweep of experiments, the experiment), the sweep's row, and what else was overridden."""
    if cfg.name:
        return _safe(cfg.name)
    variant = cfg.origin.experiment if cfg.origin.sweep and cfg.origin.experiment else cfg.model.name
    neutral = NEUTRAL if group(cfg) != data_name(cfg) and not cfg.data.name else (*NEUTRAL, "data", "data.name", "data.source")
    row = cfg.origin.get("row")
    told, known = ([row] if row else []), set(cfg.origin.get("row_overrides") or ())
    for override in cfg.origin.overrides:
        key = override.partition("=")[0].lstrip("+~")
        if cfg.data.get("global_batch_size") and (key in DEVICES or override in ("trainer=ddp", "trainer=fsdp")):
            continue
        if key == "model" and variant != cfg.model.name:  # the variant is an experiment's name
            told.append(cfg.model.name)
        elif override not in known and not any(key == k or (k == "logger" and key.startswith("logger.")) for k in neutral):
            told.append(override.lstrip("+"))
    return _safe(",".join([variant, *told]))


def _safe(text: str) -> str:
    text = re.sub(r"[^A-Za-z0-9._=,+-]", "_", text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def group_folder(cfg: DictConfig) -> Path:
    """The folder of a run's group: ``root/group``, absolute."""
    root = Path(cfg.root) / "debug" if cfg.origin.debug else Path(cfg.root)
    return (root / _safe(group(cfg))).expanduser().absolute()


def folder(cfg: DictConfig) -> Path:
    """The run's folder: ``folder=``, or ``root/group/name/seedN``, with the trial's id behind it in W&B's own sweeps; absolute."""
    if cfg.folder:
        return Path(cfg.folder).expanduser().absolute()
    trial = cfg.origin.get("trial")
    return group_folder(cfg) / name(cfg) / (f"seed{cfg.seed}-{_safe(trial)}" if trial else f"seed{cfg.seed}")


def comparable(cfg: DictConfig | dict) -> dict[str, object]:
    """Flat dotted key -> value of everything that decides what a run computes."""
    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else cfg
    flat: dict[str, object] = {}

    def walk(node, prefix):
        for key, value in node.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + str(key)] = value

    walk({k: v for k, v in plain.items() if k not in FREE}, "")
    if flat.get("data.global_batch_size"):
        flat = {k: v for k, v in flat.items() if k not in DEVICES}
    return flat


def differences(cfg: DictConfig | dict, other: DictConfig | dict) -> dict[str, tuple[object, object]]:
    """Keys in which two configurations differ: key -> (value in the first, value in the second)."""
    first, second = comparable(cfg), comparable(other)
    return {k: (first.get(k), second.get(k)) for k in sorted({*first, *second}) if first.get(k) != second.get(k)}
