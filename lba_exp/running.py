"""One run from its configuration to its record."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lba_exp import build, faults, tracking
from lba_exp.callbacks.checkpoints import BEST, load_checkpoint, newest_readable
from lba_exp.checks import check
from lba_exp.config import trainer_schema
from lba_exp.devices.processes import end_the_others, let_the_first_finish, started_from_outside
from lba_exp.devices.sharding import load_weights
from lba_exp.devices.signals import Requests
from lba_exp.errors import ConfigError, ParityError, RunFolderError, Terminated, TrainingError, UserError
from lba_exp.results import folder as folders
from lba_exp.results import naming
from lba_exp.results.figures import run_figure
from lba_exp.results.git import git_state
from lba_exp.results.log_file import log_file
from lba_exp.results.metrics_log import MetricsLog
from lba_exp.results.screen import end_table, start_panel
from lba_exp.results.secrets import redacted
from lba_exp.starting import check_weights, initialise

logger = logging.getLogger("lba_exp")
THREADS = "OMP_NUM_THREADS"


def train(cfg: DictConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Trains, validates and tests one run, or returns the record of the run where it is finished already.

    Args:
        cfg: from ``lba_exp.compose``.
        quiet: print nothing.
    Returns:
        The run's record, as in its ``result.json``; ``already_finished`` tells that nothing was run.
    Raises:
        UserError: a mistake in configuration or data, a run folder in use or of another run, or forms that differ (``parity=strict``).
    """
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"train takes a configuration from lba_exp.compose, not {type(cfg).__name__}.")
    check(cfg)
    if cfg.trainer.num_nodes > 1 and not started_from_outside():
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start the command on every node with torchrun (torchrun "
            f"--nnodes={cfg.trainer.num_nodes} --nproc-per-node=DEVICES ... -m lba_exp.commands.train ...), or with srun under Slurm."
        )
    quiet = quiet or rank_zero_only.rank != 0
    console = Console(quiet=quiet, width=None if sys.stdout.isatty() else 110)
    folder = naming.folder(cfg)
    if rank_zero_only.rank != 0:  # a further process of the same run: the first one holds the folder
        return _finished_before(cfg, folder, console) or _run(cfg, folder, console)
    with folders.Claim(folder) as claim:
        folders.check_is_ours(folder)
        if (record := _finished_before(cfg, folder, console)) is not None:
            return record
        try:
            return _run(cfg, folder, console)
        except BaseException as error:
            if isinstance(error, ConfigError) or not (folder / "config.yaml").is_file():
                claim.abandon()
            raise


def _finished_before(cfg: DictConfig, folder: Path, console: Console) -> dict[str, Any] | None:
    """The record of a run that is finished already, shown; None where there is something to run."""
    record = folders.read_record(folder)
    if record is None or record["status"] != "finished" or cfg.origin.debug:
        return None
    folders.check_same(cfg, folder)
    if cfg.resume == "never":
        raise RunFolderError(f"{folder} holds this run, finished: give another name= or seed=, or move the folder away to run it anew.")
    console.print(f"This run is finished already; to run it anew, move {folder} away. Its result:", highlight=False)
    end_table(record, console)
    return record | {"already_finished": True}


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """So many CPU threads of torch inside, as before outside; None: no change."""
    before = torch.get_num_threads()
    if number is None:
        yield
        return
    kept = os.environ.get(THREADS)
    os.environ[THREADS] = str(number)  # Lightning sets torch's threads anew in a run of several processes, unless this is given
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if kept is None:
            os.environ.pop(THREADS, None)
        else:
            os.environ[THREADS] = kept


def _run(cfg: DictConfig, folder: Path, console: Console) -> dict[str, Any]:
    with threads(cfg.threads):
        return _run_with(cfg, folder, console)


def _run_with(cfg: DictConfig, folder: Path, console: Console) -> dict[str, Any]:
    began = time.monotonic()
    data = build.data_module(cfg)
    task = build.task(cfg, data.spec)
    start = _starting_point(cfg, folder, task, console)
    notes = list(getattr(data, "notes", ()))
    if cfg.init_from is not None and start is None:
        notes += initialise(task.model, Path(cfg.init_from).expanduser(), data)
    requests = Requests()
    parts = build.Parts(cfg, folder, requests, console)
    trainer = build.trainer(cfg, folder, parts, [])  # what Lightning refuses is said before anything is written
    build.check_form(task.model, trainer)
    replicas = build.replicas(cfg, trainer)
    data.batch_size, data.sequence_parallel_size = build.batch_size(cfg, trainer), cfg.sequence_parallel_size
    if rank_zero_only.rank == 0:
        _set_aside(cfg, folder, console)
    record = _head(cfg, folder, task, trainer, data, replicas)
    trainer.loggers = logs = build.loggers(cfg, folder)
    code = 1
    with log_file(folder, first=rank_zero_only.rank == 0), requests.heard():
        try:
            if rank_zero_only.rank == 0:
                _begin(cfg, folder)
            start_panel(_telling(cfg), record["parameters"], console)
            for note in notes:
                logger.info("%s", note)
                console.print(note, highlight=False, soft_wrap=True)
            _fit_and_test(cfg, folder, task, data, trainer, logs, start, parts, record)
            code = 0
        except BaseException as error:
            let_the_first_finish()
            explained = None if isinstance(error, UserError) else faults.explain(error, cfg, folder, data.batch_size)
            stopped = isinstance(error, KeyboardInterrupt | SystemExit | Terminated)
            code = 128 + SIGTERM if isinstance(error, Terminated) else 1
            record |= {"status": "interrupted" if stopped else "failed", "error": _sentence(explained or error)}
            logger.error("%s", "".join(traceback.format_exception(error)))
            if rank_zero_only.rank != 0 and isinstance(error, Terminated | ParityError | TrainingError):
                sys.exit(0)  # raised on all devices together: the first process says it
            if isinstance(error, SystemExit):  # Lightning's way of passing on Ctrl-C
                raise KeyboardInterrupt from None
            if explained is not None:
                raise explained from error
            raise
        finally:
            if rank_zero_only.rank == 0:
                try:
                    _end(cfg, folder, record, logs, parts, began, code)
                finally:
                    if code:
                        end_the_others(trainer)
                        requests.requeue()
    end_table(record, console)
    return record


def _telling(cfg: DictConfig) -> dict[str, Any]:
    """The configuration without Lightning's own defaults, for the screen."""
    plain, defaults = OmegaConf.to_container(cfg, resolve=True), trainer_schema()()
    plain["trainer"] = {k: v for k, v in plain["trainer"].items() if v != getattr(defaults, k)}
    return plain


def _fit_and_test(cfg, folder, task, data, trainer, logs, start, parts, record) -> None:
    rows = next(log for log in logs if isinstance(log, MetricsLog))
    step = load_checkpoint(start)["global_step"] if start else -1
    rows.keep_until(step)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*number of training batches.*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer` in `LightningModule`.*")
        try:
            trainer.fit(task, datamodule=data, ckpt_path=start, weights_only=True)
        except (MisconfigurationException, ValueError) as error:
            if not _raised_by_lightning(error):
                raise
            raise ConfigError(f"trainer: {str(error).splitlines()[0].rstrip('.')}.") from None
        best = folder / "checkpoints" / BEST
        # one answer for all devices: the first may be writing that file below while another looks for it
        if trainer.strategy.broadcast(best.is_file()) and not trainer.fast_dev_run:
            content = load_checkpoint(best)
            record["best"] = {"epoch": content["epoch"], "step": content["global_step"], "monitor": cfg.checkpoint.monitor}
            load_weights(task, content["state_dict"])
        else:
            record["best"] = {"epoch": trainer.current_epoch, "step": trainer.global_step, "monitor": "none: the final weights"}
            if build.keeps_checkpoints(cfg):  # no validation came to pass
                trainer.save_checkpoint(best)
        trainer.test(task, datamodule=data, verbose=False)
    record["metrics"] = _metrics(rows.rows, record["best"]["step"])
    record["metrics"]["test"] = {k.removeprefix("test/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
    record["status"] = "finished"


def _metrics(rows: list[dict[str, Any]], step: int) -> dict[str, dict[str, float]]:
    row = next((r for r in reversed(rows) if r["step"] == step), {})
    splits = {"train": "train/", "validation": "val/"}
    return {s: {k.removeprefix(p): v for k, v in row.items() if k.startswith(p) and k != "train/step_loss"} for s, p in splits.items()}


def _set_aside(cfg: DictConfig, folder: Path, console: Console) -> None:
    """Where a run starts anew in a folder that holds one, that one is kept beside it."""
    if (cfg.resume == "never" or cfg.origin.debug) and (folder / "config.yaml").is_file():
        console.print(f"The run that was here is kept in {folders.set_aside(folder)}.", highlight=False, soft_wrap=True)


def _starting_point(cfg: DictConfig, folder: Path, task: torch.nn.Module, console: Console) -> Path | None:
    """The checkpoint to go on from; None: from the start."""
    if cfg.resume == "never" or cfg.origin.debug:
        return None
    if cfg.resume != "auto":
        if (folder / "config.yaml").is_file():
            folders.check_same(cfg, folder)
        check_weights(task.state_dict(), load_checkpoint(Path(cfg.resume))["state_dict"], f"resume={cfg.resume}")
        return Path(cfg.resume)
    if not (folder / "config.yaml").is_file():
        return None
    folders.check_same(cfg, folder)
    start, complaints = newest_readable(folder)
    for complaint in complaints:
        console.print(complaint, highlight=False)
    if start is not None:
        console.print(f"Going on from {start}{', the one before it' if complaints else ''}.", highlight=False)
    elif complaints:
        console.print("There is none before it: the run starts anew.", highlight=False)
    return start


def _begin(cfg: DictConfig, folder: Path) -> None:
    (folder / "result.json").unlink(missing_ok=True)  # of a run that failed: a record is written last
    folders.write_atomically(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    folders.write_atomically(folder / "overrides.yaml", OmegaConf.to_yaml(cfg.origin.overrides))


def _head(cfg, folder, task, trainer, data, replicas) -> dict[str, Any]:
    model = task.model
    return {
        "status": "running",
        "name": naming.name(cfg),
        "variant": cfg.model.name,
        "group": naming.group(cfg),
        "data": naming.data_name(cfg),
        "samples": dict(data.spec.sizes),
        "length": data.spec.length,
        "experiment": cfg.origin.experiment,
        "sweep": cfg.origin.sweep,
        "row": cfg.origin.row,
        "trial": cfg.origin.trial,
        "seed": cfg.seed,
        "folder": str(folder),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "form": getattr(model, "form", None),
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_size": getattr(model, "state_size", None),
        "batch": {
            "per_device": data.batch_size,
            "devices": trainer.world_size,
            "accumulated": trainer.accumulate_grad_batches,
            "global": data.batch_size * replicas * trainer.accumulate_grad_batches,
        },
        "skipped_images": getattr(data, "skipped", None) or None,
        "git": git_state(),
        "environment": build.describe_environment(trainer),
    }


def _end(cfg, folder, record, logs, parts, began, code) -> None:
    record["parity"] = parts.parity.record() if parts.parity is not None else None
    record["efficiency"] = parts.efficiency.record() | {"wall_seconds": time.monotonic() - began}
    record["decays"] = parts.decays.record()
    rows = next(log for log in logs if isinstance(log, MetricsLog))
    rows.save()
    try:
        if rows.rows:
            run_figure(rows.rows, folder / "run.png", f"{record['name']} on {record['data']}, seed {record['seed']}", cfg.parity.tolerance)
    finally:
        if any(isinstance(log, WandbLogger) for log in logs):
            tracking.finish(record, parts.samples.found, folder / "run.png", code)
        folders.write_record(folder, record)


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether an error came out of Lightning's own code: then it is about how the Trainer was set up."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.sep}lightning{os.sep}" in frames[-1].filename


def _sentence(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    return redacted(first if isinstance(error, UserError) else f"{type(error).__name__}: {first}".rstrip(": "))
