"""The presets under conf/model side by side: size, forms and how well they agree, time of a training step."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lba_exp import build
from lba_exp.callbacks import parity_measure as measure
from lba_exp.composing import compose, options
from lba_exp.errors import ConfigError
from lba_exp.nn.decay_groups import weight_decay_groups
from lba_exp.results.compare import run_form
from lba_exp.results.screen import scientific

COLUMNS = ("preset", "parameters", "state", "form", "logits", "operator", "training step")
MEMORY_BUDGET_GIB = 4.0


def run(names: Sequence[str] | None, overrides: Sequence[str], *, device: str = "cpu", threads: int | None = None) -> None:
    """Measure and print the table; arguments as of ``measure_presets``, ``threads`` of torch. Raises ConfigError without such a device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; give cpu.")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        show(list(measure_presets(names, overrides, device=device)))
        where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        print(f"float32, batches of 64 sequences, fresh weights of seed 0; {where}, torch {torch.__version__}")
    finally:
        torch.set_num_threads(before)


def measure_presets(
    names: Sequence[str] | None = None, overrides: Sequence[str] = (), *, device: str = "cpu", samples: int = 64, steps: int = 5
) -> Iterator[dict[str, Any]]:
    """One row for each preset, measured with freshly initialised weights of seed 0 on the first training batch.

    Args:
        names: entries of conf/model; None: all of them.
        overrides: of the runs' configuration, data and sizes of models among them: ``["model.width=192", "model.depth=12"]``.
        device: "cpu" or "cuda".
        samples: sequences of the batch.
        steps: training steps that are timed (forward, backward, AdamW), after one that warms up.

    Yields:
        ``preset``, ``parameters``, ``state_size`` (numbers, None where it grows with the length), ``step_ms`` (median), and ``forms``: form
        -> ``logits`` (relative L2 error of the float32 logits against the form trained in) and ``operator`` (the largest of the operator
        over all layers against float64). ``forms`` is empty for a model that has but one way of computing.

    Raises:
        ConfigError: for an unknown preset or a mistake in ``overrides``.
    """
    batches: dict[str, dict[str, Any]] = {}
    for name in names or sorted(options("model")):
        # the digits have 64 tokens: chunks small enough that states are carried between them
        cfg = compose([f"model={name}", "model.mixer.chunk_size=16", *overrides, f"data.batch_size={samples}"])
        data = str(cfg.data)
        if data not in batches:
            module = build.data_module(cfg)
            batch = next(iter(module.train_dataloader()))
            batches[data] = {"spec": module.spec, "batch": {key: value.to(device) for key, value in batch.items()}}
        yield {"preset": name, **measure_preset(cfg, **batches[data], steps=steps, device=device)}


def measure_preset(cfg: Any, spec: Any, batch: dict[str, Any], *, steps: int, device: str = "cpu") -> dict[str, Any]:
    """A row of ``measure_presets``, but its name."""
    torch.manual_seed(0)
    model = build.model(cfg.model, spec).to(device)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_size": model.state_size,
        "forms": agreement(model.eval(), batch),
    }
    return figures | {"step_ms": training_step_ms(model.train(), cfg, batch, steps)}


def agreement(model: nn.Module, batch: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each form, the float32 errors of logits and operator; see ``measure_presets``."""
    forms = list(model.forms)
    if len(forms) < 2:
        return {}
    with torch.no_grad(), measure.exact_float32():
        logits = {form: run_form(model, form, batch) for form in forms}
        shapes = measure.layer_shapes(model, batch)
        operator, _ = measure.operator_errors(model, batch, forms, shapes, MEMORY_BUDGET_GIB)
    reference = logits[model.form].double()
    errors = {form: float((found.double() - reference).norm() / reference.norm()) for form, found in logits.items()}
    return {form: {"logits": errors[form], "operator": operator[form]} for form in forms}


def training_step_ms(model: nn.Module, cfg: Any, batch: dict[str, Any], steps: int) -> float:
    """Median milliseconds of a step: forward, cross-entropy, backward, AdamW."""
    optimizer = torch.optim.AdamW(weight_decay_groups(model, cfg.optim.weight_decay), lr=cfg.optim.lr, betas=tuple(cfg.optim.betas))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["inputs"], batch.get("padding_mask")), batch["labels"]).backward()
        optimizer.step()

    step()
    return statistics.median(_milliseconds(step, batch["inputs"].device) for _ in range(steps))


def _milliseconds(call: Callable[[], None], device: torch.device) -> float:
    def synchronise() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return 1e3 * (time.perf_counter() - start)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of ``measure_presets``, a line for each form."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("preset", "form") else "right", no_wrap=True)
    for row in rows:
        state = "grows" if row["state_size"] is None else f"{row['state_size']:,}"
        first = [row["preset"], f"{row['parameters']:,}", state]
        lines = [[form, scientific(e["logits"]), scientific(e["operator"])] for form, e in row["forms"].items()]
        lines = lines or [["one form only", "", ""]]
        for number, line in enumerate(lines):
            texts = [*(first if number == 0 else [""] * 3), *line, f"{row['step_ms']:.1f} ms" if number == 0 else ""]
            table.add_row(*map(Text, texts))
    Console(width=10_000, highlight=False).print(table)
