"""Where the time of a step goes: its kernels on a GPU, its operators on the CPU, by torch's profiler."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from lba_exp.bench.measure import attempt, host_time, release

GROUPS = ("attention", "matrix products", "optimizer", "Inductor", "other")
HOST_STEPS = 3
NOT_WORK = ("gpu_user_annotation", "cuda_sync", "overhead")  # what the profiler lays beside the kernels

OURS = (  # kernels of the form "fused": functions of lba_exp.ops.fused; Triton may put a suffix to a name
    r"(?:sums|states|scan|outputs|queries_gradient|keys_gradient|around|linear_\w+)_kernel(?:_\w+)?"
)
# the first that is found in a name is its group; Inductor's kernels carry the names of what they replace, so they come first
RULES = (
    ("attention", re.compile(r"^triton_tem_\w*attention")),
    ("matrix products", re.compile(r"^triton_tem_")),
    ("Inductor", re.compile(r"^triton_|cpp_fused|CompiledFxGraph|Torch-Compiled Region|^CompiledFunction")),
    ("attention", re.compile(rf"^{OURS}$|flash|fmha|sdpa|attention|^lba_exp::", re.I)),
    ("optimizer", re.compile(r"multi_tensor_apply|adam|^Optimizer\.", re.I)),
    ("matrix products", re.compile(r"gemm|gemv|cutlass|nvjet|cublas|xmma|splitk|convolution|convolve|cudnn|mkldnn|mkl_linear", re.I)),
    ("matrix products", re.compile(r"^aten::_?(?:addmm|mm|bmm|baddbmm|linear|matmul|mv|addmv|conv[123]d)$")),
)

Profile = dict[str, Any]


class Span(NamedTuple):
    """One kernel or operator: when it ran, and for how long itself, without the operators that it called; milliseconds."""

    name: str
    group: str
    start: float
    end: float
    own: float


def group_of(name: str) -> str:
    """The one of GROUPS that a kernel or operator belongs to, by its name."""
    return next((group for group, pattern in RULES if pattern.search(name)), "other")


def short(name: str) -> str:
    """A kernel's name without its result, namespaces and arguments; other names as they are."""
    if not name.startswith("void ") and not re.search(r"[\w>]\(|<", name):
        return name
    text = re.sub(r"\b(?:\w+::)+", "", name.removeprefix("void ").replace("(anonymous namespace)::", ""))
    depth = 0
    for i, letter in enumerate(text):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and i:
            return text[:i]
    return text


def covered(spans: Iterable[Span]) -> float:
    """Milliseconds in which at least one of them ran."""
    total, last = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, last))
        last = max(last, span.end)
    return total


def profiles(
    steps: Mapping[str, Callable[[], Any]], medians: Mapping[str, float], device: torch.device, tell: Callable[[str, int], None]
) -> Iterator[Profile]:
    """One more step of each model under the profiler.

    A profile holds ``model`` and ``problem``: None, or in words why there is no profile, and then nothing else; ``step_ms``, the time
    that shares refer to (on a GPU the median of the steps in turns, which no profiler slowed down; on the CPU that of the step under the
    profiler, which slows its operators down); ``profiled_ms``, the step under the profiler to its end on the device; ``busy_ms``, in
    which a kernel (on the CPU: an operator) ran; ``idle_ms``, the rest of ``step_ms``; ``host_ms`` (``measure.host_time`` of a step);
    ``groups``, as GROUPS, and ``kernels``, the longest first, each with ``calls``, ``ms`` and ``share`` of ``step_ms``.

    Args:
        steps: model -> what takes a step, warmed up.
        medians: model -> milliseconds of a step.
        device: where the steps run.
        tell: called with what is done next, and the number of models done since the last call.
    """
    tell("the host's times", 0)
    # before the first profile, after which CUPTI stays and may slow down what the host issues
    hosts = {name: attempt(lambda step=step: host_time(step, HOST_STEPS, device))[0] for name, step in steps.items()}
    for name, step in steps.items():
        tell(f"{name}: profile", 0)
        found, problem = attempt(lambda step=step, name=name: profile(step, medians[name], device))
        release(device)
        if problem is None:
            yield {"model": name, "problem": None, "host_ms": hosts[name]} | found
        else:
            yield {"model": name, "problem": problem.reason or problem.status}
        tell("", 1)


def profile(step: Callable[[], Any], median_ms: float, device: torch.device) -> Profile:
    """The profile of one step, without its model's name and the host's time; see ``profiles``.

    Raises:
        RuntimeError: the profiler does not see the device.
    """
    trace(lambda: torch.ones(1, device=device).add_(1), device)  # the profiler itself is slow at its first call
    spans, profiled_ms = trace(step, device)
    return {"profiled_ms": profiled_ms} | summarise(spans, median_ms if device.type == "cuda" else profiled_ms)


def summarise(spans: list[Span], step_ms: float) -> Profile:
    """Times and shares by group and by name."""
    groups = [_sum(step_ms, [s for s in spans if s.group == group], group=group) for group in GROUPS]
    by_name: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        by_name.setdefault((span.name, span.group), []).append(span)
    kernels = [_sum(step_ms, found, kernel=short(name), group=group, name=name) for (name, group), found in by_name.items()]
    busy = covered(spans)
    return {
        "step_ms": step_ms,
        "busy_ms": busy,
        "idle_ms": max(0.0, step_ms - busy),
        "groups": groups,
        "kernels": sorted(kernels, key=lambda kernel: -kernel["ms"]),
    }


def _sum(step_ms: float, spans: list[Span], **names: str) -> dict[str, Any]:
    ms = sum(span.own for span in spans)
    return names | {"calls": len(spans), "ms": ms, "share": ms / step_ms}


def trace(call: Callable[[], Any], device: torch.device) -> tuple[list[Span], float]:
    """What ran in a call, and the milliseconds that it took to its end on the device.

    Raises:
        RuntimeError: the profiler does not see the device.
    """
    on_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    if activity not in torch.profiler.supported_activities():
        raise RuntimeError("torch's profiler cannot follow the GPU here (CUPTI is missing)")
    with torch.profiler.profile(activities=[activity]) as profiler:
        start = time.perf_counter()
        call()
        if on_cuda:
            torch.cuda.synchronize(device)
        wall = 1e3 * (time.perf_counter() - start)
    spans = kernels_of(profiler.events()) if on_cuda else operators_of(profiler.events())
    if not spans:
        raise RuntimeError("the profiler saw nothing run (on a GPU: CUPTI may be missing, or not be allowed)")
    return spans, wall


def kernels_of(events: Iterable[Any]) -> list[Span]:
    """Kernels, copies and fills on the device; annotations and waits, which lie over them, are left out."""
    found = []
    for e in events:
        kind = getattr(e, "activity_type", None)  # not there in older versions of torch
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation and kind not in NOT_WORK:
            start, end = e.time_range.start / 1e3, e.time_range.end / 1e3
            found.append(Span(e.name, group_of(e.name), start, end, end - start))
    return found


def operators_of(events: Iterable[Any]) -> list[Span]:
    """Operators on the CPU, each with the time of its own; what the optimizer calls is the optimizer's."""
    found = []
    for e in events:
        if e.device_type != DeviceType.CPU or e.is_async or getattr(e, "activity_type", None) == "overhead":
            continue
        outer = e
        while outer.cpu_parent is not None:
            outer = outer.cpu_parent
        group = "optimizer" if outer.name.startswith("Optimizer.") else group_of(e.name)
        found.append(Span(e.name, group, e.time_range.start / 1e3, e.time_range.end / 1e3, max(0.0, e.self_cpu_time_total) / 1e3))
    return found
