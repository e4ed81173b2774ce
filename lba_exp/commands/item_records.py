"""Runs -> the records of an item: which row of the sweep each run is, and as much of it as a table needs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lba_exp.errors import UserError
from lba_exp.results.collect import FAILED, FINISHED, Run, collect, counted
from lba_exp.results.folder import finite
from lba_exp.results.items import Item
from lba_exp.results.naming import comparable
from lba_exp.results.rows import read_rows
from lba_exp.sweeping import plan as planning

LARGEST = 20_000  # bytes of a record
DIGITS = 6
# Keys that decide nothing of what a row of a sweep is, or what its runs may differ in: seeds, places, and how it is computed.
FREE = (
    "name",
    "seed",
    "threads",
    "compile",
    "init_from",
    "parity",
    "data.source",
    "data.vocabulary",
    "data.workers",
    "data.cache",
    "model.mixer.form",
    "model.mixer.chunk_size",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
    "checkpoint.every_n_steps",
)
# What a table, a comparison or a figure reads of a record; decays go first where it would be too large.
KEPT = ("status", "error", "variant", "data", "samples", "length", "experiment", "sweep", "row", "seed", "began", "form", "parameters")
KEPT += ("state_size", "batch", "git", "environment", "best", "metrics", "efficiency", "decays")
CURVE = ("step", "epoch", "train/loss", "val/loss", "val/accuracy", "val/score", "efficiency/train_seconds")
PLACES = ("source", "vocabulary", "cache")
DROPPED = ("root", "folder", "resume", "init_from", "logger", "origin", "plugins")


def as_runs(item: Item, paths: Sequence[Path], overrides: Sequence[str] = (), every: bool = False) -> tuple[list[Run], list[str]]:
    """The finished and failed runs below some folders that are rows of an item, ``row`` and ``sweep`` filled in.

    A run is a row where its configuration is that of a job of the sweep, but for ``FREE`` and the key of the search; so a run counts that
    was started by itself.

    Args:
        overrides: with which the sweep was run, beside those of the item.
        every: all rows of the item's sweep.
    Returns:
        The runs, and remarks on what was left out.
    Raises:
        UserError: there is none.
    """
    if item.sweep is None:
        raise UserError(f"{item.name} is no table of runs: {item.command or item.verdict}")
    free = (*FREE, item.search_key) if item.search_key else FREE
    jobs: dict[str, Any] = {}
    for call in item.runs:
        for job in planning.plan([f"sweeps={item.sweep}", *map(_placeholder, call), *overrides, *_needed(item, overrides)]).jobs:
            jobs.setdefault(_key(OmegaConf.to_container(job.cfg, resolve=True), free), job)
    found, left, remarks = [], 0, []
    runs, remarks = collect(paths)
    nearest: list[str] = []
    for run in runs:
        job = jobs.get(_key(run.config, free)) if run.config else None
        if job is None or run.status not in (FINISHED, FAILED):
            left += 1
            nearest = nearest or (_differences(run.config, [j.cfg for j in jobs.values()], free) if run.config and job is None else [])
            continue
        origin = {"sweep": item.sweep, "row": job.cfg.origin.row, "experiment": job.cfg.origin.experiment}
        made = Run(run.place, {**run.record, **origin}, run.config, run.status, run.error)
        if every or made.label(item.row_key) in item.rows:
            found.append(made)
    if not found:
        hint = f" The nearest differs in {', '.join(nearest[:4])}." if nearest else ""
        raise UserError(f"no finished run in {', '.join(map(str, paths))} is a row of {item.name} (sweeps={item.sweep}).{hint}")
    if left:
        remarks.append(f"Left out: {counted(left, 'run')} that did not finish, or no job of sweeps={item.sweep} as it stands.")
    return found, remarks


def collected(item: Item, paths: Sequence[Path], overrides: Sequence[str] = ()) -> tuple[dict[str, str], list[str]]:
    """File name -> text of the records of an item's sweep below some folders, and remarks; raises UserError, see ``as_runs``."""
    runs, remarks = as_runs(item, paths, overrides, every=True)
    files: dict[str, str] = {}
    for run in runs:
        parts = [run.label(item.row_key)] + ([run.label(item.cols)] if item.cols not in ("data", item.row_key) else [])
        parts += [f"{item.search_key.rpartition('.')[2]}{run.label(item.search_key)}"] if item.search_key else []
        name = re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join([*parts, f"seed{run.label('seed')}"])) + ".json"
        if name in files:
            raise UserError(f"{run.place} and another run are both {name[:-5]} of {item.name}: give the folder of one of them.")
        files[name] = record_text(run)
    return files, remarks


def record_text(run: Run) -> str:
    """A run as a record: what a table needs of its result and of its configuration, and its curve; no place of the machine it ran on."""
    result = {key: run.record[key] for key in KEPT if run.record.get(key) is not None}
    curve = [{key: row[key] for key in CURVE if key in row} for row in read_rows(Path(run.place) / "metrics.csv")]
    curve = [row for row in curve if any(key.startswith("val/") for key in row)]
    content = {"result": result, "config": _portable(run.config), "curve": curve}
    text = _dump(content)
    if len(text) > LARGEST:
        result.pop("decays", None)
        text = _dump(content)
    if len(text) > LARGEST:
        content.pop("curve")
        text = _dump(content)
    return text


def _dump(content: Any) -> str:
    return json.dumps(_rounded(finite(content)), separators=(",", ":"), sort_keys=True) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(content) for key, content in value.items()}
    if isinstance(value, list):
        return [_rounded(content) for content in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without empty keys and without the places of one machine: a folder's name alone is kept."""
    plain = {key: value for key, value in config.items() if key not in DROPPED}

    def walk(node: Mapping[str, Any]) -> dict[str, Any]:
        kept = {}
        for key, value in node.items():
            if isinstance(value, Mapping):
                value = walk(value)
            if key in PLACES and isinstance(value, str):
                value = Path(value).name
            if value not in (None, {}, []):
                kept[key] = value
        return kept

    return walk(plain)


def _placeholder(override: str) -> str:
    """An override of an item that composes without its data: that is not looked at."""
    key, _, value = override.partition("=")
    if not value.startswith("@"):
        return override
    return f"{key}={__file__}" if key == "data.vocabulary" else f"{key}=digits"


def _needed(item: Item, overrides: Sequence[str]) -> list[str]:
    given = {override.partition("=")[0] for override in overrides}
    return [f"{key}={__file__}" for key in item.needs if key not in given]


def _flat(config: Mapping[str, Any], free: Sequence[str]) -> dict[str, Any]:
    flat = comparable(dict(config))
    return {k: v for k, v in flat.items() if not any(k == f or k.startswith(f"{f}.") for f in free)}


def _key(config: Mapping[str, Any], free: Sequence[str]) -> str:
    return json.dumps(_flat(config, free), sort_keys=True, default=str)


def _differences(config: Mapping[str, Any], others: Sequence[Any], free: Sequence[str]) -> list[str]:
    """The keys in which a configuration differs from the nearest of some others, with both values."""
    mine, best = _flat(config, free), None
    for other in others:
        theirs = _flat(OmegaConf.to_container(other, resolve=True), free)
        differing = [f"{k} ({mine.get(k)}, not {theirs.get(k)})" for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
        best = differing if best is None or len(differing) < len(best) else best
    return best or []
