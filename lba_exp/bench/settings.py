"""What a benchmark measures, read from the command line and checked before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lba_exp.errors import ConfigError
from lba_exp.messages import unknown

DTYPES = ("float64", "float32", "bfloat16", "float16")
DECAYS = ("none", "fixed", "selective", "vector")
PASSES = ("forward", "both")  # both: forward and backward
DIRECTIONS = ("both", "forward", "backward")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    """A grid of cases (lengths x dtypes x decays x passes), in each of which the forms, softmax attention and a copy take turns.

    Attributes:
        forms: names of the operator's forms and of ``lba_exp.bench.fla.NAMES``; None: all that run on the device.
        lengths: sequence lengths L in tokens, ascending.
        dtypes, decays, passes: of DTYPES, DECAYS and PASSES, in the order given.
        batch: sequences B; None where ``tokens`` is given.
        tokens: B * L, the same at every length but for what a length does not divide; None where ``batch`` is given.
        heads, key_width, value_width: H, Dk, Dv.
        scaled, direction, chunk_size: arguments of the operator.
        softmax: measure softmax attention as well.
        device: "auto" is CUDA where there is one.
        threads: of torch on the CPU; None: as torch finds it.
        repeats: turns that each form gets at each length.
        seconds: time that the turns of one form take together; a form whose one call takes longer than its turn is called once a turn.
        memory_budget_gib: working memory of a form above which it is skipped; None: the device's free memory (CPU: half of all).
    """

    lengths: tuple[int, ...]
    forms: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] = ("float32",)
    decays: tuple[str, ...] = DECAYS
    passes: tuple[str, ...] = PASSES
    batch: int | None = 1
    tokens: int | None = None
    heads: int = 4
    key_width: int = 64
    value_width: int = 64
    scaled: bool = True
    direction: str = "both"
    chunk_size: int = 64
    softmax: bool = True
    device: str = "auto"
    threads: int | None = None
    repeats: int = 5
    seconds: float = 1.0
    memory_budget_gib: float | None = None

    def batch_at(self, length: int) -> int:
        """B at a length."""
        return self.batch if self.tokens is None else max(1, self.tokens // length)


def read(options: Mapping[str, Any]) -> Settings:
    """Settings from the command line's words.

    Args:
        options: option name (underscores) -> text, None where it was not given, or a bool for a switch.
    Raises:
        ConfigError: a value that does not fit; the names of forms are checked later, with the operator at hand.
    """
    sizes = {name: whole(name, options[name]) for name in ("heads", "key_width", "value_width", "chunk_size", "repeats")}
    lengths = tuple(sorted({whole("lengths", word, "1024,4096") for word in words("lengths", options["lengths"])}))
    tokens = None if options["tokens"] is None else whole("tokens", options["tokens"])
    batch = None if options["batch"] is None else whole("batch", options["batch"])
    if tokens is not None and batch is not None:
        raise ConfigError("--tokens and --batch exclude each other: --tokens N takes N // length sequences at every length.")
    return Settings(
        lengths=lengths,
        forms=None if options["forms"] is None else tuple(words("forms", options["forms"])),
        dtypes=names("dtypes", options["dtypes"], DTYPES, "a dtype"),
        decays=names("decays", options["decays"], DECAYS, "a decay"),
        passes=names("passes", options["passes"], PASSES, "a pass"),
        batch=None if tokens is not None else batch or 1,
        tokens=tokens,
        scaled=not options["unscaled"],
        direction=one("direction", options["direction"], DIRECTIONS, "a direction"),
        softmax=not options["no_softmax"],
        device=one("device", options["device"], DEVICES, "a device"),
        threads=None if options["threads"] is None else whole("threads", options["threads"]),
        seconds=positive("seconds", options["seconds"]),
        memory_budget_gib=None if options["memory_budget_gib"] is None else positive("memory_budget_gib", options["memory_budget_gib"]),
        **sizes,
    )


def words(name: str, text: str) -> list[str]:
    """The parts of a comma-separated list, each once, in their order."""
    found = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not found:
        raise ConfigError(f"{_flag(name)} is empty: give a comma-separated list.")
    return found


def names(name: str, text: str, valid: Sequence[str], what: str) -> tuple[str, ...]:
    """A comma-separated list of known names."""
    return tuple(one(name, word, valid, what) for word in words(name, text))


def one(name: str, word: str, valid: Sequence[str], what: str) -> str:
    """A known name."""
    if word not in valid:
        raise ConfigError(f"{_flag(name)}: {unknown(word, valid, what)}")
    return word


def whole(name: str, word: str, example: str | None = None) -> int:
    """A whole number of at least 1."""
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        wanted = f"whole numbers >= 1, such as {example}" if example else "a whole number >= 1"
        raise ConfigError(f"{_flag(name)} {word} does not fit: give {wanted}.")
    return value


def positive(name: str, word: str) -> float:
    """A finite number above 0."""
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not (0 < value < math.inf):
        raise ConfigError(f"{_flag(name)} {word} does not fit: give a number above 0.")
    return value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
