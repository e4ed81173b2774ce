"""Which of the fused form's candidate plans is the fastest on the GPU at hand, kept for every later run on such a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lba_exp.bench.cases import Case, draw
from lba_exp.bench.measure import attempt, release, summary, take_turns
from lba_exp.bench.settings import Settings
from lba_exp.errors import ConfigError
from lba_exp.results.folder import write_atomically

LENGTHS = {"short": 197, "long": 4096}
MARGIN = 0.02  # by which a candidate must beat the first one: less is noise
TOLERANCE = {"half": 2e-2, "full": 1e-4}  # between the results of two candidates, relative L2
COLUMNS = ("kind", "dtype", "width", "tokens", "plan", "ms", "")


@dataclass(frozen=True)
class TuneSettings:
    """``dtypes``: "bfloat16", "float32"; ``widths``: Dk = Dv; tokens and heads of a call; seconds that one candidate's turns take."""

    dtypes: tuple[str, ...]
    widths: tuple[int, ...]
    tokens: int
    heads: int
    seconds: float
    repeats: int


def run(settings: TuneSettings) -> Path:
    """Measure, print, and write the file that ``lba_exp.ops.fused.tuned`` reads; returns its path. Raises ConfigError without a GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("tune times kernels of a GPU, and torch finds none here.")
    from lba_exp.ops.fused import operator, tuned

    if not operator.HAS_TRITON:
        raise ConfigError("tune times Triton's kernels, and Triton is not installed here.")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    rows, best = [], {}
    for key, found in measure(settings, device):
        chosen = pick(found)
        best[key] = chosen["plan"]
        rows += [(key, cell, cell is chosen) for cell in found]
    path = tuned.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, tuned.text_of(name, best))
    show(rows, f"{name}: {settings.tokens:,} tokens, {settings.heads} heads, selective decay; medians in turns")
    return path


def measure(settings: TuneSettings, device: torch.device) -> Iterator[tuple[tuple, list[dict[str, Any]]]]:
    """For each key of the candidates that is asked for, a cell a candidate: ``plan``, ``median_ms`` (None: not usable), ``reason``."""
    from lba_exp.ops.fused.candidates import CANDIDATES

    for key, listed in CANDIDATES.items():
        _, precision, width, span = key
        dtype = {"half": "bfloat16", "full": "float32"}[precision]
        if dtype not in settings.dtypes or width not in settings.widths:
            continue
        release(device)
        calls = {plan: call(key, plan, dtype, LENGTHS[span], settings, device) for plan in listed}
        results = {plan: attempt(calls[plan]) for plan in listed}
        first = next((result for result, problem in results.values() if problem is None), None)
        reasons = {plan: _reason(result, problem, first, TOLERANCE[precision]) for plan, (result, problem) in results.items()}
        del results, first
        usable = {plan: calls[plan] for plan in listed if reasons[plan] is None}
        times, problems = take_turns(usable, settings.repeats, settings.seconds, device)
        reasons |= {plan: problem.reason or problem.status for plan, problem in problems.items()}
        cells = []
        for plan in listed:
            figures = summary(times[plan]) if plan in times and plan not in problems else {"median_ms": None}
            cells.append({"plan": plan, "reason": reasons[plan]} | figures)
        yield key, cells


def call(key: tuple, plan: Any, dtype: str, length: int, settings: TuneSettings, device: torch.device) -> Callable[[], list[torch.Tensor]]:
    """One call of the kernels under a plan, which returns what they made; without decay the forward and the backward pass together."""
    from lba_exp.ops.fused import launch
    from lba_exp.ops.fused import plan as plans

    kind, _, width, _ = key
    sizes = {"heads": settings.heads, "key_width": width, "value_width": width}
    case = Case("none" if kind == "linear" else "selective", dtype, max(1, settings.tokens // length), length, Settings((length,), **sizes))
    x = draw(case, device)
    given = (x.q, x.k, x.v, x.forward_log_decay, x.backward_log_decay, None, None, launch.Call(1.0, True, True, True, True, 1e-6))
    needs = (kind != "linear",) * 2

    def once() -> list[torch.Tensor]:
        with plans.override(kind, plan):
            if kind == "forward":
                return [launch.forward(*given)[0]]
            out, den = launch.forward(*given) if kind == "linear" else kept
            found = launch.backward(*given, out, den, x.grad, None, needs)
            return [y for y in (out, *found) if y is not None]

    kept = launch.forward(*given) if kind == "backward" else None
    return once


def _reason(result, problem, first, tolerance: float) -> str | None:
    """Why a candidate is not used: it failed, or its results are others than the first one's."""
    if problem is not None:
        return problem.reason or problem.status
    for one, other in zip(result, first, strict=True):
        error = (one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-30)
        if not error <= tolerance:
            return f"its results differ by {error:.1e}"
    return None


def pick(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest cell, the first one where none beats it clearly. Raises ConfigError where none is usable."""
    timed = [cell for cell in cells if cell["median_ms"] is not None]
    if not timed:
        raise ConfigError(f"no candidate of the fused form runs on this GPU: {cells[0]['reason']}.")
    best = min(timed, key=lambda cell: cell["median_ms"])
    return best if best["median_ms"] < (1 - MARGIN) * timed[0]["median_ms"] else timed[0]


def show(rows: list[tuple], title: str) -> None:
    """Print every candidate and which of them are kept."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim", title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("width", "tokens", "ms") else "left", no_wrap=True)
    for (kind, precision, width, span), cell, chosen in rows:
        sizes = " ".join("-" if x is None else str(x) for x in vars(cell["plan"]).values())
        ms = "" if cell["median_ms"] is None else f"{cell['median_ms']:.3f}"
        note = "kept" if chosen else cell["reason"] or ""
        table.add_row(kind, "bfloat16" if precision == "half" else "float32", str(width), str(LENGTHS[span]), sizes, ms, note)
    Console(width=10_000, highlight=False).print(table)
