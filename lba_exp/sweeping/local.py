"""Jobs as processes of this machine: one after the other or several side by side, each with a log, an outcome, and its share of devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from lba_exp.sweeping import plan as planning
from lba_exp.sweeping.plan import Job, Plan

GRACE = 60.0  # seconds that a job has to save its record after Ctrl-C
POLL = 0.1
Outcome = dict[str, Any]


class Process(Protocol):
    """What is needed of a started job: ``subprocess.Popen`` has it."""

    pid: int

    def poll(self) -> int | None: ...


def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
    """Starts ``lba_exp.commands.job`` in a session of its own (Ctrl-C reaches it once, from here), its output in ``log``."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "lba_exp.commands.job", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )


class Pool:
    """Runs jobs, ``plan.parallel`` at a time.

    A job whose folder another process holds waits until that one is through; it is then finished, or its turn comes. When this process
    is interrupted, so are its jobs, and each saves its record; when it is killed, the kernel interrupts them.

    Args:
        plan: of the sweep.
        for_hydra: overrides of Hydra's own that composing a job needs (its search path).
        environment: further environment variables of the jobs.
        ended: called with each job and its outcome as it ends.
    """

    def __init__(
        self, plan: Plan, for_hydra: Sequence[str], environment: Mapping[str, str], ended: Callable[[Job, Outcome], None], say: Callable
    ):
        self.plan, self.for_hydra, self.environment, self.ended, self.say = plan, list(for_hydra), dict(environment), ended, say
        self.running: dict[int, tuple[Job, Process, Path, float]] = {}  # by slot

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs the jobs to their ends; raises KeyboardInterrupt after they were stopped."""
        waiting, told, stop = deque(jobs), False, True
        try:
            while waiting or self.running:
                free = [slot for slot in range(self.plan.parallel) if slot not in self.running]
                while free and (job := self._next(waiting)) is not None:
                    self._start(job, free.pop(0))
                if waiting and not self.running and not told:
                    told = True
                    self.say(f"waiting for {', '.join(j.label for j in waiting)}: another process runs that.")
                time.sleep(POLL if self.running else 10 * POLL)
                for slot in [s for s, (_, process, *_) in self.running.items() if process.poll() is not None]:
                    self._end(slot, waiting)
            stop = False
        finally:
            if stop:
                self._stop()

    def _next(self, waiting: deque[Job]) -> Job | None:
        """Takes the first job that no other process holds out of the queue."""
        for job in list(waiting):
            state, sentence = planning.state(job)
            if state == "running":
                continue
            waiting.remove(job)
            if state == "finished":  # by another process, while this one waited
                self.ended(job, {"status": "skipped"})
            elif state == "blocked":
                self.ended(job, {"status": "failed", "error": sentence})
            else:
                return job
        return None

    def _start(self, job: Job, slot: int) -> None:
        outcome = job.log.with_suffix(".json")
        outcome.unlink(missing_ok=True)
        with open(job.log, "ab") as log:
            log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(job.shown)}\n".encode())
        arguments = ["--outcome", str(outcome), "--parent", str(os.getpid()), "--", *job.overrides, *self.for_hydra]
        environment = os.environ | share(job.cfg, slot, self.plan.parallel) | self.environment
        self.running[slot] = (job, start(arguments, job.log, environment), outcome, time.monotonic())

    def _end(self, slot: int, waiting: deque[Job] | None) -> None:
        job, process, outcome, began = self.running.pop(slot)
        code = process.poll()
        told = _read(outcome) or {"status": "failed", "error": _ended_by(code)}
        outcome.unlink(missing_ok=True)
        if code < 0:
            _kill(process)  # what it left behind: data workers, further processes of a run
        if told["status"] == "in use" and waiting is not None:
            waiting.append(job)
            return
        self.ended(job, told | {"seconds": time.monotonic() - began})

    def _stop(self) -> None:
        """Interrupts what runs, waits until the records are saved, and ends what does not end; a second Ctrl-C ends all at once."""
        for _, process, *_ in self.running.values():
            _signal(process.pid, signal.SIGINT)
        if self.running:
            self.say("stopping; jobs save their records.")
        until = time.monotonic() + GRACE
        try:
            while time.monotonic() < until and any(process.poll() is None for _, process, *_ in self.running.values()):
                time.sleep(POLL)
        except KeyboardInterrupt:
            pass
        for _, process, *_ in self.running.values():
            while process.poll() is None:
                _kill(process)
                time.sleep(POLL)
        for slot in list(self.running):
            self._end(slot, None)


def share(cfg: DictConfig, slot: int, parallel: int) -> dict[str, str]:
    """The environment that divides a machine among jobs side by side: GPUs by turns, CPU threads evenly; what is set already stays."""
    environment = {"PYTHONUNBUFFERED": "1"}
    if sys.path[0] not in ("", os.getcwd()):  # as this process was started: the working folder hides no installed module
        environment["PYTHONSAFEPATH"] = "1"
    if parallel == 1:
        return environment
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // parallel))
    count, gpus = planning.devices(cfg), visible_gpus() if cfg.trainer.accelerator in ("auto", "gpu", "cuda") else []
    if gpus and count is not None and 0 < count <= len(gpus):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(slot * count + i) % len(gpus)] for i in range(count))
    return environment


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [g.strip() for g in named.split(",") if g.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


def _read(path: Path) -> Outcome | None:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _ended_by(code: int) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code} and told no outcome"


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill(process: Process) -> None:
    """Ends a job's whole session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
