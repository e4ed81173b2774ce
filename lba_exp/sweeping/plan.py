"""The plan of a sweep: every job composed and checked, its folder, and what is there already. Nothing is written, nothing started."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from lba_exp import composing
from lba_exp.errors import ConfigError, RunFolderError
from lba_exp.messages import unknown
from lba_exp.results import folder as folders
from lba_exp.results import naming
from lba_exp.results.collect import SWEEP
from lba_exp.sweeping.expand import Draft, bare, expand

KEPT = SWEEP  # the sweep's own folder, beside the run folders of its group
EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm"}  # launcher -> extra of this package
OWN_SWEEPER, OWN_LAUNCHER = "lba", "local"


@dataclass
class Job:
    """One job: its overrides as a launcher takes them, its configuration, its run folder, the file of its output."""

    number: int
    overrides: list[str]
    cfg: DictConfig
    folder: Path
    label: str
    log: Path

    @property
    def shown(self) -> list[str]:
        """The overrides without those that tell which sweep and row it is."""
        return [o for o in self.overrides if o.partition("=")[0] not in ("sweeps", *composing.ROW_KEYS)]


@dataclass
class Plan:
    """All jobs of a sweep; ``folder``: the sweep's own; ``parallel``: how many run side by side, as far as that is known here."""

    name: str
    folder: Path
    jobs: list[Job]
    launcher: str
    parallel: int
    outcomes: dict[int, dict[str, Any]] = field(default_factory=dict)
    stopped: int | None = None


ACTIVE: ContextVar[Plan | None] = ContextVar("ACTIVE", default=None)  # the plan that the command has checked, for the sweeper plugin


def plan(overrides: Sequence[str]) -> Plan:
    """Expands a command line of ``-m`` and checks every job.

    Raises:
        UserError: a mistake in the sweep or in any job; jobs that would share a folder; a launcher that does not fit.
    """
    parsed = composing.parse(overrides)
    for override in parsed:
        if override.is_sweep_override() and bare(override).startswith(("hydra.", "hydra/", "sweep.")):
            raise ConfigError(f"{override.input_line} lists several values: a sweep takes one {bare(override)} at a time.")
    _check_launcher_name(parsed)
    raw = composing.compose_raw([o.input_line for o in parsed if not o.is_sweep_override()])
    choices = dict(raw.hydra.runtime.choices)
    _check_sweeper(raw, choices)
    mine = [o for o in parsed if not bare(o).startswith(("hydra.", "hydra/", "sweep."))]
    for override in mine:
        composing.check_override(override, composing.search_folders(parsed))
    for_hydra = [o.input_line for o in parsed if bare(o) == "hydra.searchpath"]
    drafts = expand(OmegaConf.to_container(raw.sweep, resolve=False), [o.input_line for o in mine])
    jobs = _compose(drafts, for_hydra)
    name = choices.get("sweeps") or naming.group(jobs[0].cfg)
    made = Plan(name, _place(jobs), jobs, choices["hydra/launcher"], _parallel(raw.hydra.launcher, choices["hydra/launcher"]))
    for job in jobs:
        job.label = label(job.folder, made.folder)
        job.log = log_file(made.folder, job.label)
    _check_distinct(jobs)
    for job in jobs:
        _check_devices(job, made, raw.hydra.launcher)
    return made


def label(folder: Path, kept: Path) -> str:
    """What a job is called: its run folder as seen from the sweep's group."""
    return os.path.relpath(folder, kept.parent)


def log_file(kept: Path, label: str) -> Path:
    """Where everything goes that a job prints."""
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", label)
    return kept / "logs" / f"{name[-200:]}.log"


def _compose(drafts: Iterable[Draft], for_hydra: Sequence[str]) -> list[Job]:
    """Every job's configuration. Jobs that differ in the seed alone are composed once, where nothing refers to the seed."""
    known: dict[tuple[str, ...], DictConfig | None] = {}
    jobs = []
    for number, draft in enumerate(drafts):
        overrides = draft.all_overrides()
        seed = next((o for o in reversed(overrides) if re.fullmatch(r"seed=\d{1,9}", o)), None)
        rest = tuple(o for o in overrides if o != seed)
        like = known.get(rest) if seed else None
        if like is None:
            raw = composing.compose_raw([*overrides, *for_hydra], in_sweep=True)
            cfg = composing.finalise(raw, overrides, dict(raw.hydra.runtime.choices), in_sweep=True)
            known[rest] = None if re.search(r"seed\b[^\n]*\}", OmegaConf.to_yaml(OmegaConf.masked_copy(raw, _own(raw)))) else cfg
        else:
            cfg = deepcopy(like)
            cfg.seed = int(seed.partition("=")[2])
            cfg.origin.overrides = [o for o in overrides if o.partition("=")[0] not in composing.ROW_KEYS]
        jobs.append(Job(number, overrides, cfg, naming.folder(cfg), "", Path()))
    return jobs


def _own(raw: DictConfig) -> list[str]:
    return [key for key in raw if key not in ("hydra", "sweep")]


def _place(jobs: Sequence[Job]) -> Path:
    """The sweep's own folder: in the group of its jobs, or in their root where they are of several groups."""
    groups = sorted({naming.group_folder(job.cfg) for job in jobs})
    return (groups[0] if len(groups) == 1 else groups[0].parent) / KEPT


def _check_distinct(jobs: Sequence[Job]) -> None:
    by_folder: dict[Path, Job] = {}
    by_content: dict[str, Job] = {}
    for job in jobs:
        if (other := by_folder.setdefault(job.folder, job)) is not job:
            raise ConfigError(
                f"two jobs ({_difference(other, job)}) would share the folder {os.path.relpath(job.folder)}: "
                "leave folder= and name= out of a sweep, or vary them."
            )
        content = repr(naming.comparable(job.cfg))
        if (other := by_content.setdefault(content, job)) is not job:
            raise ConfigError(f"two jobs are the same run ({other.label} and {job.label}): take one of them out of the sweep.")


def _difference(first: Job, second: Job) -> str:
    def told(job: Job, other: Job) -> str:
        return " ".join(o for o in job.overrides if o not in other.overrides and not o.startswith(composing.ROW_KEYS[1])) or "as it is"

    return f"{told(first, second)} and {told(second, first)}"


def _check_launcher_name(parsed: Sequence[Override]) -> None:
    Plugins.instance()  # installed plugins enter their names when they are found
    known = [n.removesuffix(".yaml") for n in ConfigStore.instance().repo["hydra"]["launcher"]]
    for override in parsed:
        if bare(override) == "hydra/launcher" and (name := str(override.value())) not in known:
            if name in EXTRAS:
                raise ConfigError(f"hydra/launcher={name} is not installed: pip install 'lba-exp[{EXTRAS[name]}]'.")
            raise ConfigError(f"hydra/launcher={name}: {unknown(name, known, 'a launcher')}")


def _check_sweeper(raw: DictConfig, choices: dict[str, Any]) -> None:
    if choices["hydra/sweeper"] != OWN_SWEEPER:
        raise ConfigError(f"hydra/sweeper={choices['hydra/sweeper']} is not used: lba-train expands sweeps itself; choose a launcher.")
    if params := raw.hydra.sweeper.params:
        grid = ", ".join(f"{key}: [{values}]" for key, values in OmegaConf.to_container(params).items())
        raise ConfigError(f"hydra.sweeper.params is not used: write sweep: {{grid: {{{grid}}}}} in the sweep file.")


def _parallel(launcher: DictConfig, name: str) -> int:
    count = {"local": launcher.get("jobs", 1), "joblib": launcher.get("n_jobs", 1)}.get(name, 1)
    if name == OWN_LAUNCHER and count < 1:
        raise ConfigError(f"hydra.launcher.jobs={count} is out of range: give the number of jobs side by side, an integer >= 1.")
    return count if count > 0 else len(os.sched_getaffinity(0))


def devices(cfg: DictConfig) -> int | None:
    """Devices that a job takes on its machine; None: as many as there are, or ones that are named."""
    asked = cfg.trainer.devices
    if isinstance(asked, str) and asked.isdigit():
        asked = int(asked)
    if asked == "auto" and cfg.trainer.accelerator == "cpu":
        return 1
    return asked if isinstance(asked, int) and asked >= 0 else None


def _check_devices(job: Job, made: Plan, launcher: DictConfig) -> None:
    """Several processes a job need a process that is the run alone: our own launcher's, or Slurm's tasks."""
    trainer, count = job.cfg.trainer, devices(job.cfg)
    if (count == 1 or (OmegaConf.is_list(trainer.devices) and len(trainer.devices) == 1)) and trainer.num_nodes == 1:
        return
    if made.launcher == OWN_LAUNCHER and trainer.num_nodes == 1:
        return
    if made.launcher == "submitit_slurm":
        if launcher.tasks_per_node == count and launcher.nodes == trainer.num_nodes:
            return
        raise ConfigError(
            f"trainer.devices={trainer.devices} and trainer.num_nodes={trainer.num_nodes} need as many tasks of Slurm: give "
            f"hydra.launcher.tasks_per_node={trainer.devices} hydra.launcher.nodes={trainer.num_nodes}."
        )
    if trainer.num_nodes > 1:
        raise ConfigError(f"trainer.num_nodes={trainer.num_nodes} with -m needs hydra/launcher=submitit_slurm.")
    raise ConfigError(f"trainer.devices={trainer.devices} with hydra/launcher={made.launcher} is not safe: use hydra/launcher=local.")


def state(job: Job) -> tuple[str, str | None]:
    """What is there of a job, and a sentence where its folder cannot be used.

    ``finished``; ``running`` (another process holds it); ``failed`` or ``interrupted`` (by its record); ``unfinished`` (begun, no record);
    ``missing``; ``blocked`` (the folder holds something else). A debug run is run each time: never ``finished``.
    """
    try:
        if job.cfg.origin.debug:
            return ("running" if folders.in_use(job.folder) else "missing"), None
        record = folders.read_record(job.folder)
        if record is not None and record["status"] == "finished":
            folders.check_same(job.cfg, job.folder)
            return "finished", None
        if folders.in_use(job.folder):
            return "running", None
        if (job.folder / "config.yaml").is_file() and job.cfg.resume != "never":
            folders.check_same(job.cfg, job.folder)
        elif job.folder.is_dir() and not (job.folder / "config.yaml").is_file():
            folders.check_is_ours(job.folder)
            return "missing", None
        if record is not None and record["status"] in ("failed", "interrupted"):
            return record["status"], None
        return ("unfinished" if (job.folder / "config.yaml").is_file() else "missing"), None
    except RunFolderError as error:
        return "blocked", str(error)


def known_seconds(made: Plan) -> dict[str, list[float]]:
    """Wall seconds of finished runs of the same groups, by variant."""
    found: dict[str, list[float]] = {}
    for group in {naming.group_folder(job.cfg) for job in made.jobs}:
        for path in sorted(group.glob("*/seed*/result.json")):
            try:
                record = folders.read_record(path.parent) or {}
                if record.get("status") == "finished":
                    found.setdefault(record["variant"], []).append(float(record["efficiency"]["wall_seconds"]))
            except (RunFolderError, KeyError, TypeError, ValueError):
                continue
    return found


def estimate(made: Plan, todo: Sequence[Job], known: dict[str, list[float]]) -> float | None:
    """Seconds that jobs will take side by side, from finished runs of their variant, else of any; None where nothing is known."""
    everything = [s for seconds in known.values() for s in seconds]
    if not everything:
        return None
    total = sum(fmean(known.get(job.cfg.model.name) or everything) for job in todo)
    return total / max(1, min(made.parallel, len(todo)))
