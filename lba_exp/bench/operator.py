"""The operator's forms and softmax attention over a grid of cases, cell by cell."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import lba_exp
from lba_exp import ops
from lba_exp.bench import exact, fla
from lba_exp.bench.cases import COPY, EPS, SOFTMAX, Case, Inputs, call, choose_denominator, draw, needed_bytes
from lba_exp.bench.measure import Problem, attempt, host_time, release, summary, take_turns
from lba_exp.bench.settings import Settings, one
from lba_exp.callbacks.memory import LiveTensors
from lba_exp.errors import ConfigError

Cell = dict[str, Any]

HOST_CALLS = 9


def find_device(name: str) -> torch.device:
    """The device of a name of ``settings.DEVICES``.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; give cpu or auto.")
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def find_forms(settings: Settings, device: torch.device) -> tuple[str, ...]:
    """What to measure: the forms named, or all of the operator's that run on the device ("auto", which is one of them, left out), and
    flash-linear-attention (``fla.NAMES``) where it is there.

    Raises:
        ConfigError: a name that is no form, or flash-linear-attention where it does not run.
    """
    missing = fla.missing(device)
    if settings.forms is not None:
        named = tuple(one("forms", form, (*ops.FORMS, *fla.NAMES), "a form") for form in settings.forms)
        asked = [form for form in named if form in fla.NAMES]
        if asked and missing is not None:
            raise ConfigError(f"--forms {','.join(asked)}: flash-linear-attention {missing}.")
        return named
    case = Case("none", settings.dtypes[0], 1, 16, settings)
    inputs = draw(case, device)
    left_out = ("auto",) if device.type == "cuda" else ("auto", "fused")  # Triton's interpreter is nothing to measure
    problems = {form: attempt(call(form, case, inputs, backward=False))[1] for form in ops.FORMS if form not in left_out}
    here = tuple(form for form, problem in problems.items() if problem is None or problem.status != "not available here")
    return here if missing is not None else (*here, *fla.NAMES)


def contenders_of(settings: Settings, forms: tuple[str, ...]) -> tuple[str, ...]:
    """What takes turns: the forms, softmax attention where it is wanted, and the copy."""
    return (*forms, *((SOFTMAX,) if settings.softmax else ()), COPY)


def memory_budget(settings: Settings, device: torch.device) -> float:
    """Bytes of working memory that a form may take."""
    if settings.memory_budget_gib is not None:
        return settings.memory_budget_gib * 2**30
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader of the figures must know of the machine; nothing that identifies a person."""
    on_cuda = device.type == "cuda"
    cpu = f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    return {
        "lba_exp": lba_exp.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_cuda else cpu,
        "cuda": torch.version.cuda if on_cuda else None,
        "triton": _version("triton") if on_cuda else None,
        "flash-linear-attention": _version("fla-core") if on_cuda else None,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "load_average": load_average(),
        "memory_method": LiveTensors(device).method,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def load_average() -> list[float]:
    """Processes that ran or waited, averages of the last 1, 5 and 15 minutes: above the number of processors, the machine is busy."""
    return [round(x, 2) for x in os.getloadavg()]


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """``count`` of torch's threads inside; None: as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def grid(settings: Settings) -> list[list[Case]]:
    """The cases that are timed together: one decay and dtype at every length."""
    return [
        [Case(decay, dtype, settings.batch_at(length), length, settings) for length in settings.lengths]
        for dtype in settings.dtypes
        for decay in settings.decays
    ]


def measure(settings: Settings, forms: tuple[str, ...], device: torch.device, tell: Callable[[str, int], None]) -> Iterator[list[Cell]]:
    """The cells of one decay, dtype and pass after the other, at every length.

    Args:
        settings: the grid.
        forms: from ``find_forms``.
        device: from ``find_device``.
        tell: called with what is done next, and with the number of cells done since the last call.
    """
    contenders = contenders_of(settings, forms)
    budget = memory_budget(settings, device)
    for cases in grid(settings):
        release(device)
        prepared = {case: attempt(lambda case=case: _prepare(case, contenders, device)) for case in cases}
        for part in settings.passes:
            cells = _measure_pass(part, contenders, prepared, budget, device, tell)
            yield cells
            tell("", len(cells))
        del prepared


def _prepare(case: Case, contenders: tuple[str, ...], device: torch.device) -> tuple[Inputs, list[exact.Row], dict[str, torch.Tensor]]:
    """Inputs, the rows that are judged, and what is right there: contender -> rows in float64."""
    inputs = draw(case, device)
    rows = exact.sample_rows(case.batch, case.length)
    s = case.settings
    tensors = (inputs.q, inputs.k, inputs.v, inputs.forward_log_decay, inputs.backward_log_decay)
    right = exact.linear_rows(*tensors, rows, scaled=s.scaled, direction=s.direction, eps=EPS)
    expected = dict.fromkeys(contenders, right)
    if fla.ONCE in contenders:
        expected[fla.ONCE] = exact.linear_rows(*tensors, rows, scaled=False, direction="forward")
    if SOFTMAX in contenders:
        expected[SOFTMAX] = exact.softmax_rows(inputs.q, inputs.k, inputs.v, rows)
    return inputs, rows, expected


def _measure_pass(part, contenders, prepared, budget, device, tell) -> list[Cell]:
    """Each contender's memory and error at each length in a run of its own, then the times, all contenders and lengths in turns."""
    cells: dict[tuple[Case, str], Cell] = {}
    calls: dict[tuple[Case, str], Callable[[], torch.Tensor]] = {}
    for case, (ready, problem) in prepared.items():
        where = f"{case.decay}, {case.dtype}, {part}, {case.length:,} tokens"
        for name in contenders:
            tell(f"{where}: {name}, memory and error", 0)
            cell = cells[case, name] = _head(case, part, name)
            needed, failure = needed_bytes(name, case, part == "both", device), problem
            if failure is None and needed > budget:
                failure = Problem("skipped", f"needs about {needed / 2**30:.3g} GiB")
            if failure is None:
                figures, failure = attempt(partial(_memory_and_error, name, case, part, *ready, device))
            if failure is None:
                cell |= figures
                calls[case, name] = call(name, case, ready[0], part == "both", figures["denominator"])
            else:
                if name in fla.NAMES and failure.status == "failed":  # it refuses some backward passes, with an error
                    failure = failure._replace(status="not available here")
                cell |= _empty(failure)
                release(device)
    tell(f"{case.decay}, {case.dtype}, {part}: time", 0)
    times, problems = take_turns(calls, case.settings.repeats, case.settings.seconds, device)
    for key in calls:
        cells[key] |= _empty(problems[key]) if key in problems else summary(times[key]) | {"status": "measured"}
        if key not in problems:
            cells[key]["host_ms"] = _host_time(calls[key], cells[key]["median_ms"], case.settings, device)
    for (case, _), cell in cells.items():
        softmax, copy = (cells.get((case, name), {}).get("median_ms") for name in (SOFTMAX, COPY))
        if cell["median_ms"] is not None:
            cell["softmax_over_form"] = None if softmax is None else softmax / cell["median_ms"]
            cell["form_over_copy"] = None if copy is None else cell["median_ms"] / copy
    return list(cells.values())


def _host_time(call: Callable[[], Any], median_ms: float, settings: Settings, device: torch.device) -> float | None:
    """Of a turn's calls, but no more than HOST_CALLS; None where it cannot be had, which costs a cell none of its other figures."""
    turn = 1e3 * settings.seconds / settings.repeats / max(median_ms, 1e-6)
    return attempt(lambda: host_time(call, max(1, min(HOST_CALLS, int(turn))), device))[0]


def _memory_and_error(name, case, part, inputs, rows, expected, device) -> Cell:
    if name == COPY:  # no output that could be wrong; that there is memory for it is seen here
        call(name, case, inputs, part == "both")()
        return {"denominator": None}
    denominator = choose_denominator(name, case, inputs)
    function = call(name, case, inputs, part == "both", denominator)
    if device.type == "cuda":
        function()  # libraries take their workspaces, kernels are built
    with LiveTensors(device) as memory:
        y = function()
    error = exact.relative_error(y.transpose(1, 2) if name == SOFTMAX else y, rows, expected[name])
    return {
        "peak_bytes": memory.bytes,
        "peak_over_io": None if memory.bytes is None else memory.bytes / case.io_bytes,
        "error": error,
        "denominator": denominator,
        "reason": None if math.isfinite(error) else "the output is not finite",
    }


def _head(case: Case, part: str, name: str) -> Cell:
    head = {"decay": case.decay, "dtype": case.dtype, "pass": part, "batch": case.batch, "length": case.length, "form": name}
    return head | _empty(Problem("", None))


def _empty(problem: Problem) -> Cell:
    times = ("median_ms", "quartile_1_ms", "quartile_3_ms", "calls", "host_ms", "softmax_over_form", "form_over_copy")
    figures = (*times, "peak_bytes", "peak_over_io", "error", "denominator")
    return {"status": problem.status, "reason": problem.reason or None} | dict.fromkeys(figures)
