"""One job of a sweep. ``lba-train -m`` starts it: as a process of its own, or, with Hydra's launchers, in theirs.

python -m lba_exp.commands.job --outcome FILE --parent PID -- OVERRIDES...
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lba_exp import composing
from lba_exp.commands.common import fail
from lba_exp.errors import FolderInUseError, Terminated, UserError
from lba_exp.results import folder as folders
from lba_exp.results import naming
from lba_exp.sweeping import plan as planning

COMMAND = "lba-train"
PR_SET_PDEATHSIG = 1
EXIT_CODES = {"done": 0, "skipped": 0, "failed": 1, "in use": 1, "interrupted": 130}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of a job's process; exits with 0, with 1 after a failure, with 130 after an interruption."""
    parser = argparse.ArgumentParser("lba_exp.commands.job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outcome", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args(arguments)
    first = "LOCAL_RANK" not in os.environ  # Lightning starts the further processes of a run with the same command
    _stop_by_signals()
    if first:
        _die_with(args.parent)
    outcome = perform(lambda: composing.compose(args.overrides, in_sweep=True))
    if first:
        folders.write_atomically(args.outcome, json.dumps(folders.finite(outcome)))
    sys.exit(EXIT_CODES[outcome["status"]])


def _stop_by_signals() -> None:
    """An interruption is one wherever the sweep was started from: shells let background processes ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _die_with(parent: int) -> None:
    """Has the kernel interrupt this process when the sweep's process ends, however it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != parent:
        sys.exit("the sweep that this job belongs to has ended.")


def perform(compose: Callable[[], DictConfig]) -> dict[str, Any]:
    """One run and how it ended: ``status`` (done, skipped, failed, in use, interrupted), ``error``, ``seconds``; no failure is raised."""
    began = time.monotonic()
    outcome: dict[str, Any] = {"status": "failed"}
    try:
        cfg = compose()
        from lba_exp.running import train  # torch and Lightning: imported once the configuration is known to be right

        record = train(cfg)
        outcome["status"] = "skipped" if record.get("already_finished") else "done"
    except FolderInUseError as error:
        outcome = {"status": "in use", "error": str(error)}
        fail(COMMAND, str(error))
    except Terminated as error:
        outcome = {"status": "interrupted", "error": str(error)}
        fail(COMMAND, outcome["error"])
    except UserError as error:
        outcome["error"] = str(error)
        fail(COMMAND, str(error))
    except KeyboardInterrupt:
        outcome = {"status": "interrupted", "error": "stopped; the same command goes on from the last checkpoint."}
        fail(COMMAND, outcome["error"])
    except Exception as error:
        outcome["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        traceback.print_exc()
    return outcome | {"seconds": time.monotonic() - began}


def hydra_job(raw: DictConfig) -> dict[str, Any]:
    """The same under a launcher of Hydra's, in whichever process that calls it; its output goes to the job's log."""
    context = HydraConfig.get()
    overrides, choices = list(context.overrides.task), dict(context.runtime.choices)
    HydraConfig.instance().cfg = None  # Lightning would give the further processes of a run flags of Hydra's that lba-train has no use for
    kept = Path(context.sweep.dir)

    def compose() -> DictConfig:
        return composing.finalise(raw, overrides, choices, in_sweep=True)

    in_one_process = choices.get("hydra/launcher") == "basic"  # for a debugger: everything stays on the screen
    with nullcontext() if in_one_process else _output_to(_log(raw, overrides, choices, kept)):
        outcome = perform(compose)
    if outcome["status"] == "interrupted":
        raise KeyboardInterrupt
    return outcome


def _log(raw: DictConfig, overrides: list[str], choices: dict[str, Any], kept: Path) -> Path:
    try:
        cfg = composing.finalise(raw, overrides, choices, in_sweep=True)
        return planning.log_file(kept, planning.label(naming.folder(cfg), kept))
    except UserError:  # a file was changed since the sweep was started
        return kept / "logs" / f"job{HydraConfig.get().job.num}.log"


@contextmanager
def _output_to(log: Path):
    """Sends everything that this process and its children print to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with open(log, "a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
    finally:
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


if __name__ == "__main__":
    main()
