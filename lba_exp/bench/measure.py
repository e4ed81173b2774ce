"""Time, peak memory and failures of single calls."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from lba_exp.errors import whose_memory

LONGEST_TURN = 1000  # calls of one form in a row
SHORTEST_WAIT = 20_000_000  # clock cycles that the device is kept busy while a call is issued: about 10 ms
LONGEST_WAIT = 64 * SHORTEST_WAIT

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


class Problem(NamedTuple):
    """Why a cell holds no figures: "skipped", "out of memory", "not available here" or "failed", and the reason in words."""

    status: str
    reason: str | None


def attempt(function: Callable[[], T]) -> tuple[T | None, Problem | None]:
    """The function's result, or what went wrong; the exception is dropped at once, and with it the tensors that its frames hold."""
    try:
        return function(), None
    except Exception as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        if whose_memory(error):
            return None, Problem("out of memory", None)
        if isinstance(error, ValueError) and text.startswith("form:"):  # the operator names the argument
            return None, Problem("not available here", text.removeprefix("form:").strip())
        return None, Problem("failed", f"{type(error).__name__}: {text}")


def release(device: torch.device) -> None:
    """On CUDA, give memory that nothing refers to back to the device; on the CPU that has happened already."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def timed(call: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of ``count`` calls in a row: by events on CUDA, by the clock on the CPU."""
    if device.type != "cuda":
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in pairs:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def host_time(call: Callable[[], Any], count: int, device: torch.device) -> float | None:
    """Milliseconds of the host to issue one call on CUDA, the median of ``count`` calls; None on the CPU, where there is no such thing.

    Each call is issued behind a kernel that does nothing for a while. A call that returns before that kernel ends has not waited for the
    device; where one does not, the kernel is made longer, and where that does not help the answer is None: the call waits for the device,
    or issues more than the device's queue holds.
    """
    if device.type != "cuda":
        return None
    times: list[float] = []
    cycles = SHORTEST_WAIT
    with torch.cuda.device(device):
        while len(times) < count and cycles <= LONGEST_WAIT:
            torch.cuda.synchronize()
            torch.cuda._sleep(cycles)
            slept = torch.cuda.Event()
            slept.record()
            start = time.perf_counter()
            call()
            took = 1e3 * (time.perf_counter() - start)
            if slept.query():
                cycles *= 4
            else:
                times.append(took)
        torch.cuda.synchronize()
    return statistics.median(times) if len(times) == count else None


def take_turns(
    calls: Mapping[Key, Callable[[], Any]], repeats: int, seconds: float, device: torch.device
) -> tuple[dict[Key, list[float]], dict[Key, Problem]]:
    """Milliseconds of every call, by contender, and the contenders that broke.

    After a call each to warm up, which tells how long a call takes, the contenders take ``repeats`` turns, in alternating order, so that
    whatever else the machine does hits all alike. A turn is as many calls as fit into ``seconds / repeats``, at least one.
    """
    times: dict[Key, list[float]] = {name: [] for name in calls}
    problems: dict[Key, Problem | None] = {}
    turns = {}
    for name, call in calls.items():
        warm, problems[name] = attempt(lambda call=call: timed(call, 1, device)[0])
        if warm is not None:
            turns[name] = max(1, min(LONGEST_TURN, int(1e3 * seconds / repeats / max(warm, 1e-6))))
    for turn in range(repeats):
        for name in list(turns) if turn % 2 == 0 else list(reversed(turns)):
            if problems[name] is None:
                found, problems[name] = attempt(lambda name=name: timed(calls[name], turns[name], device))
                times[name] += found or []
    return times, {name: problem for name, problem in problems.items() if problem is not None}


def summary(times: list[float]) -> dict[str, Any]:
    """Median, quartiles (milliseconds) and the number of calls."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median_ms": middle, "quartile_1_ms": low, "quartile_3_ms": high, "calls": len(times)}
