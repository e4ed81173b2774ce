"""What a sweep tells: its plan, a line as each job ends, a summary; and what it keeps in its own folder."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from lba_exp.errors import RunFolderError
from lba_exp.results import folder as folders
from lba_exp.results.collect import CONFIGS, counted
from lba_exp.sweeping import plan as planning
from lba_exp.sweeping.plan import Job, Plan

STYLES = {"done": "green", "finished": "green", "failed": "bold red", "blocked": "bold red", "interrupted": "yellow", "running": "cyan"}
ENDS = ("done", "skipped", "failed", "interrupted", "running", "not started")


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _line(console: Console, status: str, *parts: str, width: int = 12) -> None:
    console.print(Text.assemble("  ", (f"{status:{width}}", STYLES.get(status, "dim")), *parts), soft_wrap=True)


def _failure(console: Console, job: Job, outcome: dict[str, Any]) -> None:
    _line(console, "", str(outcome.get("error")))
    if log := _log(job, outcome):
        _line(console, "", f"traceback: {os.path.relpath(log)}")


def show_plan(plan: Plan, console: Console) -> None:
    """The jobs, what is there of each, their number, and the time they will take (``--dry-run``)."""
    states = [planning.state(job) for job in plan.jobs]
    widths = len(str(len(plan.jobs))), max(len(job.label) for job in plan.jobs)
    for job, (state, sentence) in zip(plan.jobs, states, strict=True):
        _line(console, state, f"{job.number + 1:{widths[0]}}  {job.label:{widths[1]}}  {' '.join(job.shown)}")
        if sentence:
            _line(console, "", sentence)
    todo = [job for job, (state, _) in zip(plan.jobs, states, strict=True) if state not in ("finished", "blocked", "running")]
    counts = Counter(state for state, _ in states)
    told = ", ".join(f"{n} {state}" for state, n in counts.items())
    console.print(f"{counted(len(plan.jobs), 'job')} in {os.path.relpath(plan.folder.parent)}: {told}; {len(todo)} to run.", soft_wrap=True)
    if todo:
        console.print(_estimate(plan, todo), soft_wrap=True)


def _estimate(plan: Plan, todo: Sequence[Job]) -> str:
    known = planning.known_seconds(plan)
    seconds = planning.estimate(plan, todo, known)
    if seconds is None:
        return "Time: there is no finished run of this sweep yet to estimate from."
    count = sum(len(s) for s in known.values())
    side = "one after the other" if plan.parallel == 1 else f"{plan.parallel} side by side"
    side = "in all" if plan.launcher.startswith("submitit") else side
    return f"Time: about {duration(seconds)} {side}, by {counted(count, 'finished run')} of this group; the start of a process not counted."


class Report:
    """The course of a sweep on the screen and in ``summary.json``; use it as a context, around the launch."""

    def __init__(self, plan: Plan, console: Console):
        self.plan, self.console = plan, console
        self.began, self.clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        self.known = planning.known_seconds(plan)
        self.took: list[float] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task(plan.name, total=len(plan.jobs))

    def __enter__(self) -> Report:
        try:
            (self.plan.folder / "logs").mkdir(parents=True, exist_ok=True)
            jobs = [{"label": j.label, "folder": str(j.folder), "row": j.cfg.origin.row, "overrides": j.shown} for j in self.plan.jobs]
            content = OmegaConf.to_yaml(OmegaConf.create({"sweep": self.plan.name, "launcher": self.plan.launcher, "jobs": jobs}))
            folders.write_atomically(self.plan.folder / "sweep.yaml", content)
            configs = {j.label: OmegaConf.to_container(j.cfg, resolve=True) for j in self.plan.jobs}
            folders.write_atomically(self.plan.folder / CONFIGS, json.dumps(configs) + "\n")  # for tables: what is to come, by any key
            self._save()
        except OSError as error:
            raise RunFolderError(f"{self.plan.folder} cannot be written ({error.strerror}): give another root=.") from None
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()
        self._save()

    def say(self, sentence: str) -> None:
        self.bar.console.print(sentence, highlight=False, soft_wrap=True)

    def ended(self, job: Job, outcome: dict[str, Any]) -> None:
        """Takes a job's outcome (``status``; ``error``, ``seconds`` where there are) and tells it."""
        self.plan.outcomes[job.number] = outcome = _against_record(job, outcome)
        self.bar.advance(self.task)
        if outcome["status"] == "skipped" and "seconds" not in outcome:
            return
        if outcome.get("seconds"):
            self.took.append(outcome["seconds"])
        self._save()
        left = [j for j in self.plan.jobs if j.number not in self.plan.outcomes]
        parts = [f"job {len(self.plan.outcomes)}/{len(self.plan.jobs)}  {job.label}", _figures(outcome)]
        tells_each = self.plan.launcher == planning.OWN_LAUNCHER  # others tell all outcomes at the end
        if left and outcome["status"] != "interrupted" and tells_each:
            parts.append(self._remaining(left))
        _line(self.bar.console, outcome["status"], "  ".join(p for p in parts if p))
        if outcome["status"] == "failed":
            _failure(self.bar.console, job, outcome)

    def _remaining(self, left: Sequence[Job]) -> str:
        if self.took:
            seconds = fmean(self.took) * len(left) / max(1, min(self.plan.parallel, len(left)))
        else:
            seconds = planning.estimate(self.plan, left, self.known)
        return "" if seconds is None else f"about {duration(seconds)} left"

    def _save(self) -> None:
        jobs = []
        for job in self.plan.jobs:
            outcome = self.plan.outcomes.get(job.number, {"status": "not started"})
            head = {"label": job.label, "row": job.cfg.origin.row, "folder": str(job.folder)}
            jobs.append(head | outcome | {"log": _log(job, outcome)})
        summary = {
            "sweep": self.plan.name,
            "launcher": self.plan.launcher,
            "began": self.began,
            "seconds": time.monotonic() - self.clock,
            "counts": counts(self.plan),
            "jobs": jobs,
        }
        folders.write_atomically(self.plan.folder / "summary.json", json.dumps(folders.finite(summary), indent=2) + "\n")


def _log(job: Job, outcome: dict[str, Any]) -> str | None:
    """The file that tells what happened to a job; None where it was never started."""
    return next((str(path) for path in (outcome.get("log"), job.log) if path and Path(path).is_file()), None)


def _figures(outcome: dict[str, Any]) -> str:
    parts = [f"accuracy {outcome['accuracy']:.2%}"] if outcome.get("accuracy") is not None else []
    return "  ".join(parts + ([duration(outcome["seconds"])] if outcome.get("seconds") else []))


def _against_record(job: Job, outcome: dict[str, Any]) -> dict[str, Any]:
    """A job that says it is done has a finished record, of the configuration that the sweep was started with."""
    if outcome["status"] not in ("done", "skipped"):
        return outcome
    try:
        record = folders.read_record(job.folder) or {}
        if record.get("status") != "finished":
            return outcome | {"status": "failed", "error": f"{job.folder} holds no finished record."}
        folders.check_same(job.cfg, job.folder)
    except RunFolderError as error:
        return outcome | {"status": "failed", "error": f"the configuration has changed since the sweep was started: {error}"}
    return outcome | {"accuracy": record.get("metrics", {}).get("test", {}).get("accuracy")}


def counts(plan: Plan) -> dict[str, int]:
    """How many jobs ended how, those that were not started among them."""
    found = Counter(plan.outcomes.get(job.number, {"status": "not started"})["status"] for job in plan.jobs)
    return {status: found[status] for status in ENDS if found[status] or status in ("done", "skipped", "failed")}


def show_summary(plan: Plan, console: Console) -> None:
    """Every job with how it ended; of a failed one what failed and where its traceback is."""
    told = ", ".join(f"{n} {status}" for status, n in counts(plan).items())
    console.print(f"\n{counted(len(plan.jobs), 'job')}: {told}", highlight=False)
    for job in plan.jobs:
        outcome = plan.outcomes.get(job.number, {"status": "not started"})
        status = outcome["status"]
        _line(console, status, "  ".join(p for p in (job.label, _figures(outcome)) if p))
        if status == "failed":
            _failure(console, job, outcome)
    if any(plan.outcomes.get(j.number, {}).get("status") not in ("done", "skipped") for j in plan.jobs):
        console.print("The same command again runs only what is missing or failed.")
    console.print(f"Summary: {os.path.relpath(plan.folder / 'summary.json')}", soft_wrap=True, highlight=False)


def exit_code(plan: Plan) -> int:
    """0 where every job is done; 1 where one is not; 128 + n where signal n stopped the sweep."""
    if plan.stopped is not None:
        return 128 + plan.stopped
    return 0 if all(plan.outcomes.get(j.number, {}).get("status") in ("done", "skipped") for j in plan.jobs) else 1
