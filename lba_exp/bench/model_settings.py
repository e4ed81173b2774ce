"""What a benchmark of whole models in inference measures, read from the command line and checked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from lba_exp.bench.settings import DEVICES, DTYPES, names, one, positive, whole, words
from lba_exp.bench.step_settings import DATA, SIZE, check_patches, named, split
from lba_exp.composing import compose
from lba_exp.errors import ConfigError

FORMS = ("parallel", "recurrent", "chunkwise", "fused")
COMPILES = ("off", "model", "graphs")
LENGTHS = "256,1024,4096"
FORM_KEY = "model.mixer.form="
# sequences of values are drawn; the data of a configuration are there to be complete
SEQUENCES = ("data=images", "data.source=digits", "model.kind=sequence_classifier")


@dataclass(frozen=True)
class ModelSettings:
    """Forward passes of models: every form of every model at every size, in inference.

    Attributes:
        models, overrides: as of ``lba_exp.bench.step_settings.StepSettings``.
        forms: of the linear mixers, where a model's own overrides name none; what a model does not have is an empty cell.
        lengths: tokens of the sequences that a sequence classifier reads, ascending; or
        resolutions: height and width in pixels of the images that a vision Transformer reads, ascending. The other one is empty.
        chunk_sizes: of the chunkwise form, a cell each; empty: the configuration's.
        batch: sequences B; None where ``tokens`` is given.
        tokens: B * L, the same at every size but for what a length does not divide; None where ``batch`` is given.
        classes: number of classes.
        dtype: of weights and activations.
        compile: "off", "model" (the whole model, for its one shape) or "graphs" (that, its kernels recorded as CUDA graphs).
        device, threads, repeats, seconds: as of ``lba_exp.bench.settings.Settings``.
        memory_budget_gib: a form whose operator is estimated to need more is skipped; None: half of all memory on the CPU, where a process
            that takes too much is killed; on CUDA everything is tried.
        cell_seconds: a pass of which a cell, with all its passes, would take longer is left after two blocks; None: no limit.
    """

    models: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    forms: tuple[str, ...] = FORMS
    lengths: tuple[int, ...] = ()
    resolutions: tuple[int, ...] = ()
    chunk_sizes: tuple[int, ...] = ()
    batch: int | None = 1
    tokens: int | None = None
    classes: int = 1000
    dtype: str = "float32"
    compile: str = "off"
    device: str = "auto"
    threads: int | None = None
    repeats: int = 5
    seconds: float = 1.0
    memory_budget_gib: float | None = None
    cell_seconds: float | None = None

    @property
    def axis(self) -> str:
        """What is varied: "length" or "resolution"."""
        return "resolution" if self.resolutions else "length"

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.resolutions or self.lengths

    def batch_at(self, length: int) -> int:
        """B at a number of tokens per sequence."""
        return self.batch if self.tokens is None else max(1, self.tokens // length)


def read(options: Mapping[str, Any]) -> ModelSettings:
    """Settings from the command line's words; raises ConfigError for a value that does not fit."""
    models, overrides = named(options["models"])
    exclusive(options, "lengths", "resolutions", "sequences of values, or images")
    exclusive(options, "tokens", "batch", "--tokens N takes N // tokens of one sequence at every size")
    compiles = one("compile", options["compile"], COMPILES, "what is compiled")
    if options["cell_seconds"] is not None and compiles != "off":
        raise ConfigError("--cell-seconds leaves a pass between two blocks, which a compiled model does not have: give --compile off.")
    lengths = options["lengths"] or (None if options["resolutions"] else LENGTHS)
    tokens = None if options["tokens"] is None else whole("tokens", options["tokens"])
    return ModelSettings(
        models=models,
        overrides=overrides,
        forms=names("forms", options["forms"], FORMS, "a form"),
        lengths=_sizes("lengths", lengths, "1024,4096"),
        resolutions=_sizes("resolutions", options["resolutions"], "224,384"),
        chunk_sizes=_sizes("chunk_sizes", options["chunk_sizes"], "32,64"),
        batch=None if tokens is not None else whole("batch", options["batch"] or "1"),
        tokens=tokens,
        classes=whole("classes", options["classes"]),
        dtype=one("dtype", options["dtype"], DTYPES, "a dtype"),
        compile=compiles,
        device=one("device", options["device"], DEVICES, "a device"),
        threads=None if options["threads"] is None else whole("threads", options["threads"]),
        repeats=whole("repeats", options["repeats"]),
        seconds=positive("seconds", options["seconds"]),
        memory_budget_gib=None if options["memory_budget_gib"] is None else positive("memory_budget_gib", options["memory_budget_gib"]),
        cell_seconds=None if options["cell_seconds"] is None else positive("cell_seconds", options["cell_seconds"]),
    )


def forms_of(text: str, settings: ModelSettings) -> tuple[str, ...]:
    """The forms to measure of a model: the one that its own overrides name, or those of the settings."""
    own = [word.removeprefix(FORM_KEY) for word in split(text)[1:] if word.startswith(FORM_KEY)]
    return tuple(one("forms", form, FORMS, "a form") for form in own[-1:]) or settings.forms


def exclusive(options: Mapping[str, Any], first: str, second: str, why: str) -> None:
    """Raises ConfigError where both options are given."""
    if options[first] is not None and options[second] is not None:
        raise ConfigError(f"--{first} and --{second} exclude each other: {why}.")


def _sizes(name: str, text: str | None, example: str) -> tuple[int, ...]:
    return () if text is None else tuple(sorted({whole(name, word, example) for word in words(name, text)}))


def configurations(settings: ModelSettings) -> dict[str, DictConfig]:
    """Text of a model -> its configuration; raises ConfigError for an unknown preset or override, or patches that do not fit."""
    found = {}
    for text in settings.models:
        preset, *own = split(text)
        for override in settings.overrides:
            if override.startswith(FORM_KEY):
                raise ConfigError(f"{override}: the forms of all models are those of --forms.")
        base = [f"model={preset}", *(DATA if settings.resolutions else SEQUENCES), *settings.overrides]
        if settings.resolutions and not any(override.startswith("size=") for override in (*settings.overrides, *own)):
            base.append(SIZE)
        forms_of(text, settings)
        found[text] = cfg = compose([*base, *own])
        for resolution in settings.resolutions:
            check_patches("--resolutions", resolution, cfg)
    return found
