"""How a metric is written, and which of two values of it is the better one."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Words in the names of metrics that one wants small.
LOWER = {"loss", "error", "rel", "abs", "perplexity", "ppl", "different", "ties"}
LOWER |= {"seconds", "ms", "time", "latency", "bytes", "memory", "parameters", "size"}
# Beginnings and endings of names whose values are neither good nor bad: where the best checkpoint was, how large the batch.
NEUTRAL = (
    ("best/", "batch/", "decays/", "environment/", "parity/worst/epoch", "parity/worst/step"),
    ("count", "validations", "tolerance", "gib"),
)
UNITS = {"seconds": "s", "ms": "ms"}
NAMES = {
    "efficiency/train_seconds": "training time",
    "efficiency/wall_seconds": "wall time",
    "efficiency/peak_memory_bytes": "training memory",
    "efficiency/tokens_per_second": "training speed",
    "state_size": "recurrent state, numbers",
}


def lower_is_better(metric: str) -> bool:
    """By the last part of its name: losses, errors, times, sizes."""
    return bool(LOWER & set(re.split(r"[_/]", metric.rpartition("/")[2])))


def is_ranked(metric: str) -> bool:
    """Whether one value of it is better than another."""
    return not metric.startswith(NEUTRAL[0]) and not metric.endswith(NEUTRAL[1])


def is_share(metric: str) -> bool:
    """A share that is written in percent: an accuracy or an agreement."""
    return metric.endswith(("accuracy", "agreement"))


@dataclass(frozen=True)
class Style:
    """How the values of a metric are written in one table.

    Attributes:
        unit: as shown in a heading; empty where there is none.
        scale: what a value is multiplied by.
        decimals: digits after the point; None: two digits and an exponent.
    """

    unit: str
    scale: float
    decimals: int | None

    def text(self, value: float) -> str:
        text = self.plain(value)
        if self.unit == "%" and text == "100.00" and value < 1:
            return "99.99"  # a share below one never reads 100
        return text

    def plain(self, value: float) -> str:
        """A value, a spread or a difference, as its digits say."""
        if self.decimals is None:
            return "0" if value == 0 else f"{value * self.scale:.1e}"
        return f"{value * self.scale:,.{self.decimals}f}"

    def rounded(self, value: float) -> float:
        """The value that is shown: two that read alike are equal."""
        return float(self.text(value).replace(",", ""))


def style(metric: str, values: Sequence[float]) -> Style:
    """How to write a metric whose values in the table are these: percent, MiB or GiB, or three (times) or four digits in all."""
    last = metric.rpartition("/")[2]
    if is_share(metric):
        return Style("%", 100, 2)
    if last.endswith("bytes"):
        large = bool(values) and statistics.median(values) >= 2**30
        return Style("GiB", 2**-30, 2) if large else Style("MiB", 2**-20, 1)
    if last in ("rel", "max_abs", "native_rel", "operator_rel"):
        return Style("", 1, None)
    unit = "tokens/s" if last == "tokens_per_second" else next((u for ending, u in UNITS.items() if last.endswith(ending)), "")
    if values and all(float(value).is_integer() for value in values):
        return Style(unit, 1, 0)
    size = statistics.median(abs(value) for value in values) if values else 0
    digits = 3 if unit else 4  # times and speeds are not more exact
    return Style(unit, 1, min(6, max(0, digits - 1 - math.floor(math.log10(size)))) if size else digits)


def heading(metric: str, unit: str) -> str:
    """A metric's name for people, with its unit."""
    form = re.fullmatch(r"parity/(\w+)/rel", metric)
    name = f"error of the {form[1]} form" if form else NAMES.get(metric, metric)
    name = name.replace("/", " ").replace("_", " ") if name.count("/") < 2 else name
    return f"{name}, {unit}" if unit else name
