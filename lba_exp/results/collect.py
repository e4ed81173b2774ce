"""Runs out of their folders, as rows for tables: read with json and yaml alone."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lba_exp.errors import UserError
from lba_exp.messages import unknown
from lba_exp.results import naming

FINISHED, FAILED, INTERRUPTED, UNFINISHED, UNREADABLE, MISSING = (
    "finished",
    "failed",
    "interrupted",
    "unfinished",
    "unreadable",
    "missing",
)
STATUSES = (FINISHED, FAILED, INTERRUPTED, UNFINISHED, UNREADABLE, MISSING)
# Short names for keys of a record; every other key is one of the record's or of the configuration's.
ALIASES = {"model": "variant"}
SWEEP, CONFIGS = ".sweep", "configs.json"  # a sweep's own folder, and its file of the configuration of every job
ABSENT = "—"  # how the label of a key reads that a run does not have
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Run:
    """One run.

    Attributes:
        place: where it lies: its folder, or its address on W&B.
        record: what ``result.json`` holds; where there is none, what the configuration tells of it.
        config: the resolved configuration; empty where it cannot be read.
        status: ``finished``, ``failed``, ``interrupted``, ``unfinished`` (no record yet: it runs, or was killed), ``unreadable`` or
            ``missing`` (a job of a sweep that has not begun).
        error: why there is no result; None where there is one.
        log: of a job that left no run folder, where its traceback is.
    """

    place: str
    record: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    status: str = FINISHED
    error: str | None = None
    log: Path | None = None

    @cached_property
    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, of the record's upper level, then the configuration, then the rest of the record."""
        upper = {k: v for k, v in self.record.items() if not isinstance(v, Mapping)}
        return {**flatten(self.record, "."), **flatten(self.config, "."), **upper}

    @cached_property
    def numbers(self) -> dict[str, float | None]:
        """Metric -> value; None where the record says that there is no (finite) number. See ``metric_name`` for how they are called."""
        found = {}
        for key, value in flatten(self.record, "/").items():
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                finite = value is not None and abs(value) < float("inf")
                found[key.removeprefix("metrics/").replace("parity/forms/", "parity/")] = value if finite else None
        return found

    def label(self, key: str) -> str:
        """The value of a key as text: ``model``, ``data``, ``seed``, ``row``, ``sweep``, ..., or a key of the configuration."""
        value = self.flat.get(ALIASES.get(key, key), ABSENT)
        if isinstance(value, bool) or value is None:
            return {True: "true", False: "false", None: "none"}[value]
        return str(value)


def flatten(node: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, the keys of a path joined by ``separator``; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, separator, path + separator)
        else:
            flat[path] = value
    return flat


def collect(paths: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """The runs in and below some folders, in order of their paths, each once.

    A run folder is one with a ``config.yaml``; nothing is searched inside of it. What was set aside by ``resume=never`` and the runs of
    ``debug=`` count only where they are named themselves. Where a sweep lies there, those of its jobs count too that have no run folder:
    not begun yet, or failed before anything was written.

    Returns:
        The runs, and remarks on what was left out.
    Raises:
        UserError: a path is no folder, or no run lies in or below them.
    """
    found: dict[Path, Run] = {}
    debug = 0
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is no folder: give run folders, or folders that hold some (runs).")
        folders, sweeps = _search(path)
        for run in itertools.chain(map(read_run, folders), *map(_without_folder, sweeps)):
            identity = Path(run.place).resolve()
            if identity in found:
                continue
            if run.flat.get("origin.debug") and Path(run.place) != path:
                debug += run.status != MISSING
                continue
            found[identity] = run
    if not found:
        hint = f" but {counted(debug, 'run')} of debug=" if debug else ""
        raise UserError(f"no run lies in or below {', '.join(map(str, paths))}{hint}: a run folder holds config.yaml.")
    return list(found.values()), [f"Left out: {counted(debug, 'run')} of debug=."] if debug else []


def counted(number: int, word: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {word}" + ("" if number == 1 else "s")


def _search(path: Path) -> tuple[list[Path], list[Path]]:
    """The run folders in and below a folder, and the folders of the sweeps there."""
    runs, sweeps = [], []
    for place, folders, files in os.walk(path):
        if "config.yaml" in files:
            folders.clear()
            runs.append(Path(place))
        if SWEEP in folders:
            sweeps.append(Path(place) / SWEEP)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and ".aside" not in f)
    return runs, sweeps


def _without_folder(sweep: Path) -> Iterator[Run]:
    """The jobs of a sweep, as it was started last, that have no run folder."""
    try:
        jobs = json.loads((sweep / "summary.json").read_text("utf-8"))["jobs"]
        left = [(sweep.parent / job["label"], job) for job in jobs]
        left = [(Path(os.path.normpath(folder)), job) for folder, job in left if not (folder / "config.yaml").is_file()]
        configs = json.loads((sweep / CONFIGS).read_text("utf-8")) if left else {}
        for folder, job in left:
            if (config := configs.get(job["label"])) is not None:
                ended = job["status"] in (FAILED, INTERRUPTED)
                name = Path(job.get("log") or "none").name
                log = next((log for log in (sweep / "logs" / name, sweep / name) if ended and log.is_file()), None)
                status, error = (job["status"], job.get("error")) if ended else (MISSING, "not begun yet")
                yield Run(str(folder), _told_by(config), config, status, error, log)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # of another version, or being written
        return


def read_run(folder: Path) -> Run:
    """One run folder; whatever is wrong in it becomes the run's status and error, never an exception."""
    config, record, error = {}, None, None
    try:
        config = yaml.load((folder / "config.yaml").read_text("utf-8"), _Loader)
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
            config, error = {}, "config.yaml is not a run's configuration"
    except (OSError, ValueError, yaml.YAMLError):
        config, error = {}, "config.yaml cannot be read"
    if (folder / "result.json").is_file():
        try:
            record = json.loads((folder / "result.json").read_text("utf-8"))
            if not isinstance(record, dict) or record.get("status") not in STATUSES:
                record, error = None, "result.json is not a run's record"
        except (OSError, ValueError):
            error = "result.json cannot be read"
    elif error is None:
        return Run(str(folder), _told_by(config), config, UNFINISHED, "no result.json: it runs still, or was killed")
    if error is not None:
        return Run(str(folder), {**_told_by(config), **(record or {})}, config, UNREADABLE, error)
    return Run(str(folder), {**_told_by(config), **record}, config, record["status"], record.get("error"))


def _told_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration alone tells of a run, under a record's keys."""
    try:
        needed = {key: config[key] for key in ("name", "seed", "origin")}  # OmegaConf takes 16 ms for a whole configuration
        model, data = ({key: config[group][key] for key in keys} for group, keys in (("model", ["name"]), ("data", ["name", "source"])))
        cfg = OmegaConf.create({**needed, "model": model, "data": data})
        return {
            "name": naming.name(cfg),
            "variant": cfg.model.name,
            "group": naming.group(cfg),
            "data": naming.data_name(cfg),
            "experiment": cfg.origin.experiment,
            "sweep": cfg.origin.sweep,
            "row": cfg.origin.get("row"),
            "seed": cfg.seed,
        }
    except (OmegaConfBaseException, AttributeError, KeyError, TypeError):  # a configuration of another version, or none
        return {}


def metric_name(metric: str, runs: Sequence[Run]) -> str:
    """The full name of a metric: ``test/accuracy``, ``validation/loss`` (or ``val/loss``), ``parity/recurrent/rel``, ``parameters``,
    ``efficiency/wall_seconds`` (or ``wall_seconds``), ...

    Raises:
        UserError: no finished run has it.
    """
    finished = [run for run in runs if run.status == FINISHED]
    known = dict.fromkeys(key for run in finished for key in run.numbers)
    name = metric.replace(".", "/")
    name = f"validation/{name[4:]}" if name.startswith("val/") else name
    for candidate in (name, f"efficiency/{name}"):
        if candidate in known or not finished:
            return candidate
    listed = sorted({k for run in finished for k, v in run.numbers.items() if v is not None and not k.startswith(("environment/", "seed"))})
    shown = [k for k in listed if k.startswith(("test/", "validation/", "train/", "efficiency/")) or k.endswith("/rel") or "/" not in k]
    rest = ", or another number of result.json" if len(shown) < len(listed) else ""
    raise UserError(f"--metric: {_nearest(metric, listed, 'a metric of these runs')} Valid: {', '.join(shown)}{rest}.")


def _nearest(word: str, known: Iterable[str], what: str) -> str:
    """``unknown`` without the list of all names."""
    said, question, _ = unknown(word, known, what).partition("?")
    return said + question if question else f"{word!r} is not {what}."


def check_keys(keys: Sequence[str], runs: Sequence[Run], option: str) -> None:
    """Raises UserError for a key that no run has."""
    known = dict.fromkeys(key for run in runs for key, value in run.flat.items() if not isinstance(value, list | dict | float))
    known |= dict.fromkeys([*(key for run in runs for key in flatten(run.config, ".")), *ALIASES])
    for key in keys:
        if ALIASES.get(key, key) not in known:
            short = [*ALIASES, "task", *(k for k in runs[0].record if k in known and k != "variant")]
            valid = f"Valid: {', '.join(dict.fromkeys(short))}, or a key of config.yaml such as optim.lr."
            raise UserError(f"{option}: {_nearest(key, known, 'a key of these runs')} {valid}")


def select(runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """The runs that fulfil every condition ``key=value`` or ``key=value,value``.

    Raises:
        UserError: a condition is none, names no key, or nothing is left.
    """
    kept = list(runs)
    for condition in conditions:
        key, equals, values = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: write key=value, or key=value,value.")
        check_keys([key], runs, "--where")
        there = sorted({run.label(key) for run in kept})
        kept = [run for run in kept if run.label(key) in values.split(",")]
        if not kept:
            raise UserError(f"--where {condition} leaves no run: {key} is {', '.join(there)} here.")
    return kept
