"""Writes a run's numbers to its loggers: one row per optimizer step, in step with the checkpoints."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console

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

    def _log(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _save(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLog):
                logger.save()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        last_part = trainer.fit_loop.epoch_loop._accumulated_batches_reached() or trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if last_part and trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            row = {
                "epoch": trainer.current_epoch,
                "train/step_loss": float(loss.detach()) * trainer.accumulate_grad_batches,
                "optim/lr": rate,
            }
            self._log(trainer, row)
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
        for key, label in (("train/loss", "train loss"), ("val/loss", "val loss"), ("val/accuracy", "val accuracy")):
            if key in metrics:
                shown.append(f"{label} {metrics[key]:.4f}")
        errors = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith("parity/") and k.endswith("/rel")}
        if errors:
            worst = max(errors, key=errors.get)
            shown.append(f"parity {errors[worst]:.1e} ({worst})")
        self.console.print("  ".join(shown) + f"  {time.monotonic() - self._began:.0f} s", highlight=False, soft_wrap=True)


class Efficiency(pl.Callback):
    """Measures what training costs: tokens per second, time per optimizer step, peak memory, seconds.

    The clock runs from one training batch to the next, data loading included, validation and its parity checks excluded. Sums are kept in
    the checkpoint, so that an interrupted run reports the cost of all its parts.
    """

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self.tokens = 0
        self.steps = 0
        self._clock: float | None = None
        self._first = True

    def state_dict(self) -> dict[str, Any]:
        return {"train_seconds": self.train_seconds, "tokens": self.tokens, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.train_seconds, self.tokens, self.steps = state["train_seconds"], state["tokens"], state["steps"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._start(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._stop(trainer)
        if self._first:  # the first batch of a process pays for start-up
            self._first = False
            self.train_seconds -= self._last
        else:
            inputs = batch["inputs"]
            mask = batch.get("padding_mask")
            self.tokens += int(inputs.shape[0] * inputs.shape[1] if mask is None else mask.sum()) * trainer.world_size
            self.steps += 1
        self._start(trainer)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._clock = None

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._start(trainer)

    def _start(self, trainer: pl.Trainer) -> None:
        self._clock = time.perf_counter()

    def _stop(self, trainer: pl.Trainer) -> None:
        self._last = 0.0
        if self._clock is not None:
            if trainer.strategy.root_device.type == "cuda" and self.steps % 50 == 0:
                torch.cuda.synchronize()
            self._last = time.perf_counter() - self._clock
            self.train_seconds += self._last
            self._clock = None

    def metrics(self) -> dict[str, float | None]:
        """The figures so far, by logger key."""
        figures = self.record()
        return {f"efficiency/{k}": v for k, v in figures.items() if k != "peak_memory_method"}

    def record(self) -> dict[str, Any]:
        """tokens_per_second, batch_ms (mean time of a training batch), train_seconds, peak_memory_bytes and how it was measured."""
        peak, method = peak_memory()
        timed = self.steps > 0 and self.train_seconds > 0
        return {
            "tokens_per_second": self.tokens / self.train_seconds if timed else None,
            "step_ms": 1000 * self.train_seconds / self.steps if timed else None,
            "train_seconds": self.train_seconds,
            "peak_memory_bytes": peak,
            "peak_memory_method": method,
        }


def peak_memory() -> tuple[int | None, str]:
    """Peak memory of this process so far in bytes, and how it was measured: CUDA's allocator, else the process's resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated(), "cuda allocator, peak since training began"
    try:
        import resource
        import sys
    except ImportError:  # no such module on Windows
        return None, "not available"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "peak resident set of the process, libraries included"
