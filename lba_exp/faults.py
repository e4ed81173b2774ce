"""What goes wrong outside of the configuration, while a run runs, in one sentence: no memory left, no disk left."""

from __future__ import annotations

import errno
from pathlib import Path

import torch
from omegaconf import DictConfig

from lba_exp.errors import RunFolderError, TrainingError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(error: BaseException, cfg: DictConfig, folder: Path) -> UserError | None:
    """The sentence for an exception that the user can mend; None for any other.

    Args:
        error: what a run raised.
        cfg: the run's configuration.
        folder: the run's folder.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        where = "GPU" if isinstance(error, torch.OutOfMemoryError) else "the machine"
        return TrainingError(
            f"out of memory on {where} with data.batch_size={cfg.data.batch_size} (data.eval_batch_size={cfg.data.eval_batch_size}): "
            "give a smaller one, with trainer.accumulate_grad_batches to keep the optimizer's batch, model.mixer.form=chunkwise, "
            "or trainer.precision=bf16-mixed."
        )
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and (cause.errno in FULL or (cause.filename and Path(str(cause.filename)).is_relative_to(folder))):
            lost = "the last checkpoint there is whole, and the same command goes on from it"
            full = "free some space" if cause.errno in FULL else "make it writable"
            return RunFolderError(f"the run folder {folder} cannot be written ({cause.strerror}): {full}; {lost}.")
    return None
