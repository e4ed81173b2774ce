"""What goes wrong outside of the configuration, while a run runs, in one sentence: no memory left, no disk left, a process lost."""

from __future__ import annotations

import errno
from pathlib import Path

import torch
from omegaconf import DictConfig

from lba_exp.errors import RunFolderError, TrainingError, UserError, whose_memory

FULL = (errno.ENOSPC, errno.EDQUOT)
LOST = ("Connection closed by peer", "Connection reset by peer")  # gloo's words, in errors of no class of their own


def explain(error: BaseException, cfg: DictConfig, folder: Path, batch_size: int) -> UserError | None:
    """The sentence for an exception that the user can mend; None for any other.

    Args:
        error: what a run raised.
        cfg: the run's configuration.
        folder: the run's folder.
        batch_size: sequences of a training batch on one device.
    """
    if where := whose_memory(error):
        given = f"data.batch_size={batch_size}"
        advice = "give a smaller one, with trainer.accumulate_grad_batches to keep the optimizer's batch"
        if cfg.data.global_batch_size is not None:
            given, advice = f"{batch_size} sequences a device", "give more trainer.accumulate_grad_batches: the global batch stays"
        return TrainingError(
            f"out of memory on {where} with {given} (data.eval_batch_size={cfg.data.eval_batch_size}): {advice}; or "
            "model.mixer.form=chunkwise, or trainer.precision=bf16-mixed."
        )
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and (cause.errno in FULL or (cause.filename and Path(str(cause.filename)).is_relative_to(folder))):
            lost = "the last checkpoint there is whole, and the same command goes on from it"
            full = "free some space" if cause.errno in FULL else "make it writable"
            return RunFolderError(f"the run folder {folder} cannot be written ({cause.strerror}): {full}; {lost}.")
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)):
        return TrainingError(
            "another process of the run has ended, or cannot be reached: what it said is on the screen and in train.log; the same command "
            "goes on from the last checkpoint."
        )
    return None
