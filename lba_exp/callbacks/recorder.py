"""Writes a run's numbers to its loggers: one row per optimizer step, in step with the checkpoints."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from torch import Tensor

from lba_exp.results.metrics_log import MetricsLog


class Recorder(pl.Callback):
    """Logs training numbers every ``trainer.log_every_n_steps`` steps, and validation, parity and cost after each validation.

    The step of a row is the number of optimizer steps done. Rows reach the disk before the checkpoint of the same step does (checkpoint
    callbacks come last), so that a resumed run has every row once.

    Args:
        sources: callbacks with a ``metrics() -> dict[str, float]`` that is read after each validation (parity, efficiency).
        console: where a line per validation goes; None for silence.
    """

    def __init__(self, sources: tuple[Any, ...] = (), console: Console | None = None):
        self.sources = sources
        self.console = console
        self._began = time.monotonic()
        self._loss: Tensor | None = None  # of the optimizer step so far

    def _log(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _save(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLog):
                logger.save()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        last_part = trainer.fit_loop.epoch_loop._accumulated_batches_reached() or trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        # Lightning has divided a batch's loss by the number of batches of a step: their sum is the step's
        loss = (outputs["loss"] if isinstance(outputs, dict) else outputs).detach().float()
        self._loss = loss if self._loss is None else self._loss + loss
        if last_part and trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            step_loss = trainer.strategy.reduce(self._loss, reduce_op="mean") if trainer.world_size > 1 else self._loss
            step_loss = step_loss * getattr(module, "step_correction", lambda: 1.0)()
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            row = {
                "epoch": trainer.current_epoch,
                "train/step_loss": float(step_loss),
                "optim/lr": rate,
            }
            self._log(trainer, row)
        if last_part:
            self._loss = None
        self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics: dict[str, float] = {"epoch": trainer.current_epoch}
        metrics |= getattr(module, "take_train_metrics", dict)()
        metrics |= {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/") and k != "val/selection"}
        for source in self.sources:
            metrics |= {k: float(v) for k, v in source.metrics().items() if v is not None}
        self._log(trainer, metrics)
        self._save(trainer)
        if self.console is not None and trainer.is_global_zero:
            self._line(trainer, metrics)

    def _line(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        steps = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        shown = [f"epoch {trainer.current_epoch + 1}{epochs}", f"step {trainer.global_step}{steps}"]
        for key in ("train/loss", "val/loss", "val/accuracy", "val/score"):
            if key in metrics:
                shown.append(f"{key.replace('/', ' ')} {metrics[key]:.4f}")
        errors = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith("parity/") and k.endswith("/rel")}
        if errors:
            worst = max(errors, key=errors.get)
            shown.append(f"parity {errors[worst]:.1e} ({worst})")
        self.console.print("  ".join(shown) + f"  {time.monotonic() - self._began:.0f} s", highlight=False, soft_wrap=True)
