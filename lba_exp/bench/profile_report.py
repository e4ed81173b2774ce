"""Profiles of training steps as tables and as kernels.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from lba_exp.bench.profile import GROUPS
from lba_exp.bench.report import milliseconds

SHOWN = 15  # kernels of a model; all of them are in kernels.csv
WIDEST = 72  # letters of a kernel's name in a table
GROUP_COLUMNS = ("model", "step", *GROUPS, "idle", "host")
KERNEL_COLUMNS = ("kernel", "group", "calls", "time", "of the step")
CSV_COLUMNS = ("model", "group", "kernel", "calls", "ms", "share", "name")

Record = Mapping[str, Any]
Row = tuple[str, ...]


def tables(record: Record) -> Iterator[tuple[str, tuple[str, ...], list[Row], int]]:
    """Title, columns, rows, and the number of columns that hold words: the models' groups, then each model's kernels."""
    made = [profile for profile in record.get("profiles", ()) if profile["problem"] is None]
    if made:
        yield "Where the time of a step goes", GROUP_COLUMNS, [group_row(profile) for profile in made], 1
    for profile in made:
        yield f"{profile['model']}: {title_of(profile, record)}", KERNEL_COLUMNS, kernel_rows(profile), 2


def group_row(profile: Mapping[str, Any]) -> Row:
    """A model's line, as GROUP_COLUMNS."""
    step, host = profile["step_ms"], profile["host_ms"]
    times = [*(group["ms"] for group in profile["groups"]), profile["idle_ms"]]
    shares = (f"{milliseconds(ms)} ({ms / step:.0%})" if ms else "" for ms in times)
    return (profile["model"], milliseconds(step), *shares, "" if host is None else milliseconds(host))


def kernel_rows(profile: Mapping[str, Any]) -> list[Row]:
    """The longest kernels, as KERNEL_COLUMNS, and the others in one line."""
    kernels = profile["kernels"]
    rows = [(cut(k["kernel"]), k["group"], f"{k['calls']:,}", milliseconds(k["ms"]), f"{k['share']:.1%}") for k in kernels[:SHOWN]]
    if rest := kernels[SHOWN:]:
        calls, ms, share = (sum(k[what] for k in rest) for what in ("calls", "ms", "share"))
        rows.append((f"{len(rest):,} more", "", f"{calls:,}", milliseconds(ms), f"{share:.1%}"))
    return rows


def cut(name: str) -> str:
    """A name of at most WIDEST letters."""
    return name if len(name) <= WIDEST else name[: WIDEST - 1] + "…"


def title_of(profile: Mapping[str, Any], record: Record) -> str:
    """Busy and idle time in words."""
    step, busy = profile["step_ms"], profile["busy_ms"]
    if not on_gpu(record):
        return f"in operators {milliseconds(busy)} ({busy / step:.0%}) of the {milliseconds(step)} of a step under the profiler"
    return (
        f"device busy {milliseconds(busy)} ({busy / step:.0%}) of a step's {milliseconds(step)} "
        f"({milliseconds(profile['profiled_ms'])} under the profiler)"
    )


def on_gpu(record: Record) -> bool:
    """Whether the steps ran on a GPU."""
    return record["environment"]["cuda"] is not None


def notes(record: Record) -> list[str]:
    """What the columns mean."""
    if all(profile["problem"] is not None for profile in record.get("profiles", ())):
        return []
    groups = (
        "attention: kernels of the form fused and of scaled_dot_product_attention; other forms are matrix products and elementwise "
        "kernels, and counted there. Inductor: kernels that torch.compile made. Names decide."
    )
    if not on_gpu(record):
        return [
            "profile: one more step under torch's profiler, which makes small operators slower; each operator without those that it calls; "
            "idle: outside of operators (Python, autograd).",
            groups,
        ]
    return [
        "profile: kernels of one more step under torch's profiler; shares are of the median step in turns, which ran without it; idle: the "
        "median without the time in which a kernel ran, where the device waits for the host; host: the host's time to issue a step "
        "while the device has other work, empty where the host had to wait for the device (more launches than its queue holds).",
        groups,
    ]


def reasons(record: Record) -> list[str]:
    """Why models have no profile."""
    return [f"{p['model']} has no profile: {p['problem']}" for p in record.get("profiles", ()) if p["problem"] is not None]


def comma_separated(record: Record) -> str:
    """Every kernel of every model, one a line, numbers and names in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for profile in record["profiles"]:
        writer.writerows({"model": profile["model"]} | kernel for kernel in profile.get("kernels", ()))
    return text.getvalue()
