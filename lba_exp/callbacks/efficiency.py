"""What training costs: speed, memory, floating-point operations, time to a given accuracy."""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lba_exp.callbacks.flops import peak_flops, training_flops


class Efficiency(pl.Callback):
    """Measures what training costs: tokens per second over all devices, time per optimizer step, peak memory, model FLOPs utilisation,
    seconds and steps to a validation accuracy.

    The clock is that of the first process; it runs from one training batch to the next, data loading included. Left out are validation
    and its parity checks, the first batch of a process, and batches for which torch.compile made a graph or recorded one. Sums are kept in
    the checkpoint, so that an interrupted run reports the cost of all its parts.

    Args:
        target_accuracy: the validation accuracy whose first time is noted; None: no such time.
    """

    def __init__(self, target_accuracy: float | None = None) -> None:
        self.target_accuracy = target_accuracy
        self.train_seconds = 0.0
        self.tokens = 0  # of all devices
        self.steps = 0.0  # optimizer steps, a batch of several being a part of one
        self.seconds_to_target: float | None = None
        self.steps_to_target: int | None = None
        self.peak: int | None = None
        self.method = "not available"
        self._here: int | Tensor = 0  # tokens of this device that are not in ``tokens`` yet
        self._clock: float | None = None
        self._first = True
        self._graphs = 0
        self._flops: tuple[int | None, str] | None = None  # of a sequence, forward and backward
        self._shape = (1, 1)  # sequences of a batch, tokens of a sequence
        self._limit: tuple[float | None, str] = (None, "no batch was trained on")
        self._trainer: pl.Trainer | None = None

    def state_dict(self) -> dict[str, Any]:
        self._gather()  # every process makes a checkpoint's content, the first one writes it
        kept = ("train_seconds", "tokens", "steps", "seconds_to_target", "steps_to_target")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reset_peak(trainer.strategy.root_device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._see_peak()
        self._gather()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        model = getattr(pl_module, "model", None)
        if self._flops is not None or model is None:
            return
        with trainer.precision_plugin.forward_context():
            self._flops = training_flops(getattr(model, "_orig_mod", model), batch)
        if "padding_mask" in batch:  # lengths differ from batch to batch
            self._flops = self._flops[0], f"{self._flops[1]}, at the length of the first batch"
        sequences = len(batch["inputs"])
        self._shape = sequences, int(count_tokens(model, {"inputs": batch["inputs"]})) // sequences
        device = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._limit = peak_flops(name, str(trainer.precision))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._first or compiled_graphs() != self._graphs:  # it pays for start-up, or for compiling
            self._finish()
            self._first = False
            self.train_seconds -= self._last
        else:
            self._stop()
            self._here = self._here + count_tokens(pl_module.model, batch)
            self.steps += 1 / trainer.accumulate_grad_batches
        self._start()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()
        if not trainer.sanity_checking:
            self._see_peak()  # what validation and its parity checks need is not what training needs
            self._gather()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reset_peak(trainer.strategy.root_device)
        accuracy = trainer.callback_metrics.get("val/accuracy")
        wanted = self.target_accuracy is not None and self.steps_to_target is None and not trainer.sanity_checking
        if wanted and accuracy is not None and float(accuracy) >= self.target_accuracy:
            self.seconds_to_target, self.steps_to_target = self.train_seconds, trainer.global_step
        self._start()

    def _gather(self) -> None:
        """Adds the tokens of all devices since the last time; every process calls."""
        here, self._here = self._here, 0
        if self._trainer is not None and self._trainer.world_size > 1:
            here = torch.as_tensor(here, dtype=torch.float64, device=self._trainer.strategy.root_device)
            here = self._trainer.strategy.reduce(here, reduce_op="sum")
        self.tokens += int(here)

    def _see_peak(self) -> None:
        device, ranks = self._trainer.strategy.root_device, self._trainer.world_size
        peak, self.method = read_peak(device)
        if ranks > 1:
            over_all = torch.tensor(-1.0 if peak is None else peak, dtype=torch.float64, device=device)
            peak = int(self._trainer.strategy.reduce(over_all, reduce_op="max"))
            peak = None if peak < 0 else peak
            self.method += f", the largest of {ranks} devices"
        self.peak = peak if self.peak is None or peak is None else max(self.peak, peak)

    def _start(self) -> None:
        self._graphs = compiled_graphs()
        self._clock = time.perf_counter()

    def _stop(self) -> None:
        self._last = 0.0
        if self._clock is not None:
            self._last = time.perf_counter() - self._clock
            self.train_seconds += self._last
            self._clock = None

    def _finish(self) -> None:
        """Stops the clock once the device has done what it was given: it works behind the batches that are counted."""
        if self._clock is not None and self._trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self._stop()

    def metrics(self) -> dict[str, float | None]:
        """The figures so far that are numbers, by logger key."""
        return {f"efficiency/{k}": v for k, v in self.record().items() if isinstance(v, int | float) and k != "target_accuracy"}

    def record(self) -> dict[str, Any]:
        """The cost so far; None where a figure is missing.

        ``tokens_per_second`` over all devices, ``step_ms`` (mean time of an optimizer step), ``train_seconds``, ``peak_memory_bytes`` of
        the device that needs most and ``peak_memory_method``; ``flops_per_step`` over all devices, forward and backward, and
        ``flops_method``; ``tflops_per_second`` over all devices; ``mfu``, the share of the devices' peak, and ``mfu_peak``, which peak that
        is or why there is none; ``seconds_to_target`` and ``steps_to_target``, training time and optimizer steps until the validation
        accuracy first was ``target_accuracy``.
        """
        ranks = 1 if self._trainer is None else self._trainer.world_size
        accumulate = 1 if self._trainer is None else self._trainer.accumulate_grad_batches
        timed = self.steps > 0 and self.train_seconds > 0
        rate = (self.tokens + int(self._here) * ranks) / self.train_seconds if timed else None
        flops, method = self._flops or (None, "no batch was trained on")
        peak, which = self._limit
        sequences, length = self._shape
        speed = None if flops is None or rate is None else flops / length * rate
        return {
            "tokens_per_second": rate,
            "step_ms": 1000 * self.train_seconds / self.steps if timed else None,
            "train_seconds": self.train_seconds,
            "peak_memory_bytes": self.peak,
            "peak_memory_method": self.method,
            "flops_per_step": None if flops is None else flops * sequences * accumulate * ranks,
            "flops_method": method,
            "tflops_per_second": None if speed is None else speed / 1e12,
            "mfu": None if speed is None or peak is None else speed / (peak * ranks),
            "mfu_peak": which,
            "target_accuracy": self.target_accuracy,
            "seconds_to_target": self.seconds_to_target,
            "steps_to_target": self.steps_to_target,
        }


def compiled_graphs() -> int:
    """Grows with each graph that torch.compile makes in this process, and with each that is recorded as a CUDA graph."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return 0
    counters = dynamo.counters  # a recording counts the inputs that it copies, of which there are always some
    return counters["stats"]["unique_graphs"] + counters["inductor"]["cudagraph_recorded_non_static_inputs"]


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


def count_tokens(model: torch.nn.Module, batch: dict[str, Any]) -> int | Tensor:
    """Tokens of a batch, padding left out. A model of a plugin without ``count_tokens`` has a token a position of (B, L, ...)."""
    inputs, mask = batch["inputs"], batch.get("padding_mask")
    if mask is not None:
        return mask.sum()
    return model.count_tokens(inputs) if hasattr(model, "count_tokens") else inputs.shape[0] * inputs.shape[1]
