"""Checkpoints that survive a crash at any moment: written beside their target, renamed into place, the one before kept."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lba_exp.config import CheckpointSchema
from lba_exp.errors import UserError

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a file beside its target, forces it to disk and renames it; ``last.ckpt`` becomes ``previous.ckpt`` first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with open(part, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # Ctrl-C in the midst of it comes out of torch as an error of the file
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and path.exists():
            link = path.with_name(f".{PREVIOUS}.part")
            link.unlink(missing_ok=True)
            os.link(path, link)  # a second name, not a move: last.ckpt exists at every moment
            os.replace(link, path.with_name(PREVIOUS))
        os.replace(part, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Always with ``weights_only``, which Lightning 2.6 forgets to pass on to some strategies: no code of a stranger's runs."""
        return super().load_checkpoint(path, map_location or "cpu", weights_only=True)


def validation_due(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this training batch; a checkpoint written between the two makes Lightning 2.6 skip it on resume."""
    every = trainer.val_check_batch
    return trainer.is_last_batch or any((n + 1) % every == 0 for n in (batch_idx, trainer.fit_loop.total_batch_idx))


class StepCheckpoint(ModelCheckpoint):
    """Saves every n optimizer steps, but never where a validation is due: Lightning 2.6 would skip that validation and the epoch's end
    on resume. The checkpoint after the validation takes its place."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not validation_due(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def checkpoint_callbacks(folder: Path, settings: CheckpointSchema) -> list[ModelCheckpoint]:
    """The callbacks that keep best.ckpt (on validation) and last.ckpt (after each validation, and every n steps where asked).

    The best one comes first, so that last.ckpt knows of it.
    """
    common = {"dirpath": folder / "checkpoints", "enable_version_counter": False, "auto_insert_metric_name": False}
    monitor, mode = ("val/loss", "min") if settings.monitor == "val/loss" else ("val/selection", "max")
    callbacks = [
        ModelCheckpoint(filename="best", monitor=monitor, mode=mode, save_top_k=1, save_on_train_epoch_end=False, **common),
        ModelCheckpoint(filename="last", save_top_k=1, every_n_epochs=1, save_on_train_epoch_end=False, **common),
    ]
    if settings.every_n_steps is not None:
        callbacks.append(StepCheckpoint(filename="last", save_top_k=1, every_n_train_steps=settings.every_n_steps, **common))
    return callbacks


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint on the CPU, with ``weights_only`` (no code of a stranger's runs).

    Raises:
        UserError: the file is missing, cut short, or no checkpoint.
    """
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("there is no such file")
        if not zipfile.is_zipfile(path):
            raise ValueError("the file is cut short or of another kind")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not {"state_dict", "global_step"} <= content.keys():
            raise ValueError("it is no checkpoint of a run")
        return content
    except Exception as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(f"the checkpoint {path} cannot be read ({reason}).") from None


def newest_readable(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from in a run folder, and a sentence for each newer one that cannot be read."""
    complaints = []
    for name in (LAST, PREVIOUS):
        path = folder / "checkpoints" / name
        if path.exists():
            try:
                load_checkpoint(path)
                return path, complaints
            except UserError as error:
                complaints.append(str(error))
    return None, complaints
