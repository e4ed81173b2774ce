"""Writes a run's numbers to its loggers: one row per optimizer step, in step with the checkpoints."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path
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
        self.peak: int | None = None
        self.method = "not available"
        self._clock: float | None = None
        self._first = True

    def state_dict(self) -> dict[str, Any]:
        return {"train_seconds": self.train_seconds, "tokens": self.tokens, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.train_seconds, self.tokens, self.steps = state["train_seconds"], state["tokens"], state["steps"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        reset_peak(trainer.strategy.root_device)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._see_peak(trainer)

    def _see_peak(self, trainer: pl.Trainer) -> None:
        peak, self.method = read_peak(trainer.strategy.root_device)
        self.peak = peak if self.peak is None or peak is None else max(self.peak, peak)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._stop(trainer)
        if self._first:  # the first batch of a process pays for start-up
            self._first = False
            self.train_seconds -= self._last
        else:
            self.tokens += count_tokens(module.model, batch) * trainer.world_size
            self.steps += 1
        self._start()

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._clock = None
        self._see_peak(trainer)  # what validation and its parity checks need is not what training needs

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        reset_peak(trainer.strategy.root_device)
        self._start()

    def _start(self) -> None:
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
        timed = self.steps > 0 and self.train_seconds > 0
        return {
            "tokens_per_second": self.tokens / self.train_seconds if timed else None,
            "step_ms": 1000 * self.train_seconds / self.steps if timed else None,
            "train_seconds": self.train_seconds,
            "peak_memory_bytes": self.peak,
            "peak_memory_method": self.method,
        }


def count_tokens(model: torch.nn.Module, batch: dict[str, Any]) -> int:
    """Tokens of a batch, padding left out. A model of a plugin without ``count_tokens`` has a token a position of (B, L, ...)."""
    inputs, mask = batch["inputs"], batch.get("padding_mask")
    if mask is not None:
        return int(mask.sum())
    return model.count_tokens(inputs) if hasattr(model, "count_tokens") else inputs.shape[0] * inputs.shape[1]


def reset_peak(device: torch.device) -> None:
    """Starts the measurement of peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the process's peak resident set becomes its present one


def read_peak(device: torch.device) -> tuple[int | None, str]:
    """Peak memory in bytes since the last reset, and how it was measured; None where it cannot be had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda allocator, while training"
    try:
        with open("/proc/self/clear_refs", "a"):  # may not be reset: the figure would be the process's maximum ever
            status = Path("/proc/self/status").read_text()
    except OSError:
        return None, "not available"
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return (
        (int(peak.group(1)) * 1024, "resident set of the process while training, libraries included") if peak else (None, "not available")
    )
