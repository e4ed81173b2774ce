"""A sweep from its plan to its summary, whatever launches its jobs."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from rich.console import Console

from lba_exp.results import folder as folders
from lba_exp.stopping import number_of, stopped_by_signals
from lba_exp.sweeping import plan as planning
from lba_exp.sweeping import report as reporting
from lba_exp.sweeping.plan import Job, Plan


def console() -> Console:
    """The screen; a narrow default would cut nothing but is ugly in a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def perform(plan: Plan, launcher: Any) -> None:
    """Runs what is not finished and tells how each job ended; ``plan.outcomes`` and ``plan.stopped`` hold the result.

    Args:
        plan: checked.
        launcher: a Hydra launcher, set up; gets the overrides of all jobs at once.
    Raises:
        RunFolderError: the sweep's own folder cannot be written.
    """
    screen = console()
    with reporting.Report(plan, screen) as report, stopped_by_signals():
        try:
            todo = _to_do(plan, report)
            if todo:
                _launch(plan, launcher, todo, report)
        except KeyboardInterrupt as stop:
            plan.stopped = number_of(stop)
    reporting.show_summary(plan, screen)


def _to_do(plan: Plan, report: reporting.Report) -> list[Job]:
    """The jobs to launch; the others get their outcomes here."""
    todo = []
    for job in plan.jobs:
        state, sentence = planning.state(job)
        if state == "finished" and job.cfg.resume != "never":
            report.ended(job, {"status": "skipped"})
        elif state == "finished":
            report.ended(job, {"status": "failed", "error": "this run is finished: move its folder away to run it anew (resume=never)."})
        elif state == "blocked":
            report.ended(job, {"status": "failed", "error": sentence})
        elif state == "running" and plan.launcher != planning.OWN_LAUNCHER:
            report.ended(job, {"status": "failed", "error": f"{job.folder} is in use by another process."})
        else:
            todo.append(job)
    if (skipped := len(plan.outcomes)) and todo:
        report.say(f"{len(plan.jobs)} jobs, {len(todo)} to run ({skipped} finished or not usable).")
    return todo


def _launch(plan: Plan, launcher: Any, todo: Sequence[Job], report: reporting.Report) -> None:
    """Hands the jobs over; a launcher that dies loses no outcome that a record tells."""
    returns, died = [], None
    if plan.launcher == planning.OWN_LAUNCHER:
        launcher.report = report  # it tells each job as it ends
    try:
        returns = list(launcher.launch([job.overrides for job in todo], initial_job_idx=0))
    except Exception as error:
        died = f"the launcher {plan.launcher} failed: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        (plan.folder / "launcher.log").write_text(traceback.format_exc(), "utf-8")
    finally:
        for job, back in zip(todo, returns + [None] * len(todo), strict=False):
            if job.number not in plan.outcomes and (outcome := _outcome(job, back, died)):
                report.ended(job, outcome | ({} if job.log.is_file() else {"log": str(plan.folder / "launcher.log")}))


def _outcome(job: Job, back: JobReturn | None, died: str | None) -> dict[str, Any] | None:
    """How a job ended: by what it returned, else by its record; None where it has not begun."""
    value = back._return_value if back is not None else None
    if isinstance(value, dict) and "status" in value:
        return value
    if isinstance(value, BaseException):
        return {"status": "failed", "error": f"{type(value).__name__}: {value}"}
    record = _record(job)
    if record is not None and record["status"] == "finished":
        return {"status": "done"}
    if record is not None:
        return {"status": record["status"], "error": record.get("error")}
    if died and planning.state(job)[0] == "running":
        return {"status": "running", "error": f"{died}; this job goes on without it"}
    return {"status": "failed", "error": died} if died else None


def _record(job: Job) -> dict[str, Any] | None:
    try:
        return folders.read_record(job.folder)
    except folders.RunFolderError:
        return None
