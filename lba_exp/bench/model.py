"""Forward passes of whole models in inference: every form at every size, cell by cell."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from lba_exp import build
from lba_exp.bench.measure import Problem, attempt, release, summary, take_turns
from lba_exp.bench.model_counts import Counts, operator_flops, read_counts
from lba_exp.bench.model_settings import ModelSettings, forms_of
from lba_exp.bench.operator import memory_budget
from lba_exp.bench.pace import OVER, PACED_BLOCKS, pace, two_blocks_bytes
from lba_exp.bench.steps import CHANNELS, compiled, fresh_compiler
from lba_exp.callbacks.flops import COUNTED_AS_THEY_ARE, LINEAR, training_flops
from lba_exp.callbacks.memory import LiveTensors
from lba_exp.callbacks.parity_measure import linear_layers, over_budget
from lba_exp.data.spec import DataSpec

Cell = dict[str, Any]
Contender = tuple[str | None, int | None]  # form, tokens a chunk

FIGURES = (
    *("median_ms", "quartile_1_ms", "quartile_3_ms", "calls", "sequences_per_second", "tokens_per_second", "estimated_ms"),
    *("peak_bytes", "forward_bytes", "resident_bytes", "counted_flops", "counted_form", "operator_flops", "token_bytes"),
)
PASSES = 3  # of a cell beside its turns: for the pace, for the memory, and the one that warms up


def data_spec(settings: ModelSettings, size: int) -> DataSpec:
    """The synthetic inputs in numbers: images, or sequences of one value a token."""
    names = [str(i) for i in range(settings.classes)]
    length, channels, grid = (size * size, CHANNELS, (size, size)) if settings.resolutions else (size, 1, None)
    return DataSpec("synthetic", length, settings.classes, names, channels, None, {"test": 1}, "", grid=grid)


def contenders(configurations: Mapping[str, DictConfig], settings: ModelSettings) -> dict[str, list[Contender]]:
    """Text of a model -> what is measured of it; one (None, None) for a model without forms.

    Raises:
        lba_exp.errors.ConfigError: a model that cannot be built for these inputs.
    """
    found = {}
    for name, cfg in configurations.items():
        with torch.device("meta"):
            linear = bool(build.model(cfg.model, data_spec(settings, settings.sizes[0])).forms)
        chunks = settings.chunk_sizes or (cfg.model.mixer.chunk_size,)
        found[name] = [(form, chunk) for form in forms_of(name, settings) for chunk in (chunks if form == LINEAR else (None,))]
        found[name] = found[name] if linear else [(None, None)]
    return found


def measure(
    configurations: Mapping[str, DictConfig],
    found: Mapping[str, list[Contender]],
    settings: ModelSettings,
    device: torch.device,
    tell: Callable[[str, int], None],
) -> Iterator[list[Cell]]:
    """The cells of one size after the other; all that are measured at one size take turns.

    A cell holds ``model``, ``form``, ``chunk_size``, the size (``length`` or ``resolution``), ``tokens`` of a sequence, ``batch``,
    ``parameters``, ``state_size`` (numbers of the recurrent form's states, for each sequence), FIGURES, and ``status`` and ``reason``. One
    that takes longer than ``settings.cell_seconds`` is "over the limit": it holds the ``estimated_ms`` of a pass, and the memory of its
    first two blocks, or neither where a smaller size tells that these would take too long already.

    Args:
        configurations: from ``model_settings.configurations``.
        found: from ``contenders``.
        device: from ``operator.find_device``.
        tell: called with what is done next, and with the number of cells done since the last call.
    """
    over: dict[tuple[str, str | None, int | None], Cell] = {}
    for size in settings.sizes:
        release(device)
        with nullcontext() if settings.compile == "off" else fresh_compiler():
            cells = _measure_size(size, configurations, found, settings, device, tell, over)
        yield cells
        over |= {(c["model"], c["form"], c["chunk_size"]): c for c in cells if c["estimated_ms"] is not None}
        tell("", len(cells))


def _measure_size(size, configurations, found, settings, device, tell, over) -> list[Cell]:
    """Each contender's memory and operations in a run of its own, then the times, all contenders in turns.

    ``over``: the cells that were over the limit at smaller sizes, which tell what need not be tried.
    """
    cells: dict[tuple[str, str | None, int | None], Cell] = {}
    calls: dict[tuple[str, str | None, int | None], Callable[[], Tensor]] = {}
    drawn: dict[int, Tensor] = {}
    for name, cfg in configurations.items():
        tell(f"{name}, {settings.axis} {size:,}: weights", 0)
        torch.manual_seed(0)
        model = build.model(cfg.model, data_spec(settings, size)).eval()
        about = {"model": name, settings.axis: size, "tokens": _tokens(model, settings, size)}
        about |= {"batch": settings.batch_at(about["tokens"])}
        about |= {"parameters": sum(p.numel() for p in model.parameters()), "state_size": model.state_size}
        subject, problem = attempt(partial(_Subject, model, drawn, about["batch"], size, settings, device))
        for form, chunk in found[name]:
            tell(f"{name}, {settings.axis} {size:,}: {form or 'memory'}", 0)
            key = (name, form, chunk)
            failure = problem or subject.too_large(form) or subject.too_slow(about, over.get(key))
            if failure is None:
                ready, failure = attempt(partial(subject.prepare, form, chunk))
            cells[key] = about | {"form": form, "chunk_size": chunk} | _empty(failure or Problem("", None))
            if failure is None:
                cells[key] |= ready[1]
                if cells[key]["status"] != OVER:
                    calls[key] = ready[0]
            ready = None
            release(device)
        del subject, model
    tell(f"{settings.axis} {size:,}: time", 0)
    times, problems = take_turns(calls, settings.repeats, settings.seconds, device)
    for key in calls:
        cells[key] |= _empty(problems[key]) if key in problems else _timed(times[key], cells[key])
    return list(cells.values())


class _Subject:
    """One model at one size on the device, with a batch of inputs; every form is a view of the same weights.

    Args:
        model: in evaluation mode.
        drawn: batch -> inputs of this size, shared by the models.
    """

    def __init__(self, model: nn.Module, drawn: dict[int, Tensor], batch: int, size: int, settings: ModelSettings, device: torch.device):
        self.model = model.to(device, getattr(torch, settings.dtype))
        self.batch, self.settings, self.device = batch, settings, device
        if batch not in drawn:
            drawn[batch] = _draw(batch, size, settings, device)
        self.inputs = drawn[batch]
        standing = LINEAR if LINEAR in model.forms else next(iter(model.forms), None)
        self.counts: Counts = read_counts(self._view(standing, None), self.inputs[:1])
        self._counted: dict[tuple[str | None, int | None], int | None] = {}
        unlimited = device.type == "cuda" and settings.memory_budget_gib is None
        self._budget = float("inf") if unlimited else memory_budget(settings, device) / 2**30

    def _view(self, form: str | None, chunk: int | None) -> nn.Module:
        shared = {id(x): x for x in (*self.model.parameters(), *self.model.buffers())}
        view = copy.deepcopy(self.model, shared)
        for layer in linear_layers(view):
            if chunk is not None and hasattr(layer, "chunk_size"):
                layer.chunk_size = chunk
        if form is not None:
            view.set_form(form)
        return view

    def too_large(self, form: str | None, batch: int | None = None) -> Problem | None:
        """Why a form is not even tried."""
        if form is None:
            return None
        shapes = [(call.length, call.heads, call.key_width, call.value_width) for call in self.counts.calls]
        itemsize = getattr(torch, self.settings.dtype).itemsize
        reason = over_budget(form, batch or self.batch, shapes, self._budget, itemsize)
        return None if reason is None else Problem("skipped", reason)

    def too_slow(self, about: Cell, smaller: Cell | None) -> Problem | None:
        """Why a form is not even tried that was over the limit at a smaller size: the blocks that are run to tell would be already, if time
        grew as the number of tokens does; it does not grow less."""
        if smaller is None:
            return None
        more = about["tokens"] * about["batch"] / (smaller["tokens"] * smaller["batch"])
        if PACED_BLOCKS * more * 1e-3 * smaller["estimated_ms"] / len(self.model.blocks) <= self.settings.cell_seconds:
            return None
        return Problem(OVER, f"not tried, as {smaller['tokens']:,} tokens took too long")

    def prepare(self, form: str | None, chunk: int | None) -> tuple[Callable[[], Tensor], Cell]:
        """What is timed, warmed up, and the figures that are no times; ValueError for a form that the model does not have."""
        if form is not None and form not in self.model.forms:
            raise ValueError(f"form: {self._obstacle(form)}")
        view = self._view(form, chunk)
        forward = compiled(view, self.settings.compile)

        def call() -> Tensor:
            with torch.no_grad():
                return forward(self.inputs)

        found: Cell = {}
        if self.settings.cell_seconds is not None:
            longest = self.settings.cell_seconds / (PASSES + self.settings.repeats)
            seconds, left = pace(call, view.blocks, longest, self.device)
            if left:
                reason = f"2 of {len(view.blocks)} blocks were run, whose pace tells the time, and whose memory stands here"
                found = {"status": OVER, "estimated_ms": 1e3 * seconds, "reason": reason}
        elif self.device.type == "cuda" or self.settings.compile != "off":
            call()  # it is compiled, libraries take their workspaces, kernels are built
        if found:
            taken = two_blocks_bytes(call, view.blocks, self.device)
        else:
            with LiveTensors(self.device) as memory:
                y = call()
            found["reason"] = None if bool(y.isfinite().all()) else "the output is not finite"
            # the pool of a CUDA graph is taken once, before, and shared with the other models'
            taken = None if self.settings.compile == "graphs" else memory.bytes
        resident = sum(x.nbytes for x in (*view.parameters(), *view.buffers(), self.inputs))
        counted_form = form if form in COUNTED_AS_THEY_ARE else LINEAR
        return call, found | {
            "forward_bytes": taken,
            "resident_bytes": resident,
            "peak_bytes": None if taken is None else resident + taken,
            "counted_flops": self._count(view, counted_form),
            "counted_form": counted_form,
            "operator_flops": operator_flops(self.counts.calls, form, _chunk_of(view)),
            "token_bytes": self.counts.token_bytes,
        }

    def _obstacle(self, form: str) -> str:
        if form == "fused":
            if self.device.type != "cuda":
                return "'fused' runs on CUDA devices alone"
            dtype = getattr(torch, self.settings.dtype)
            reasons = (layer.fused_obstacle(self.device, dtype) for layer in linear_layers(self.model) if hasattr(layer, "fused_obstacle"))
            return next((reason.removeprefix("form: ") for reason in reasons if reason), "'fused' is no form of every layer")
        return f"this model has the forms {', '.join(self.model.forms)}, not {form!r}"

    def _count(self, view: nn.Module, form: str | None) -> int | None:
        """Operations of a forward pass over one sequence, as torch counts them; None where there is no memory for it."""
        key = (form, _chunk_of(view) if form == LINEAR else None)
        if key not in self._counted:
            self._counted[key] = None
            if self.too_large(form or "parallel", batch=1) is None:  # softmax attention is counted as matrix products
                found, _ = attempt(lambda: training_flops(view, {"inputs": self.inputs[:1]})[0])
                self._counted[key] = None if found is None else found // 3  # the callback's figure is three forward passes
        return self._counted[key]


def _chunk_of(model: nn.Module) -> int | None:
    return next((layer.chunk_size for layer in linear_layers(model) if hasattr(layer, "chunk_size")), None)


def _tokens(model: nn.Module, settings: ModelSettings, size: int) -> int:
    """Tokens of a sequence or an image, the class token included."""
    height, width = model.grid if settings.resolutions else (size, 1)
    return height * width + (getattr(model, "class_token", None) is not None)


def _draw(batch: int, size: int, settings: ModelSettings, device: torch.device) -> Tensor:
    """Normal numbers: (B, 3, size, size) or (B, size, 1)."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, CHANNELS, size, size) if settings.resolutions else (batch, size, 1)
    return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, settings.dtype))


def _empty(problem: Problem) -> Cell:
    return {"status": problem.status, "reason": problem.reason or None} | dict.fromkeys(FIGURES)


def _timed(times: list[float], cell: Cell) -> Cell:
    found = summary(times)
    rate = 1e3 * cell["batch"] / found["median_ms"]
    return found | {"status": "measured", "sequences_per_second": rate, "tokens_per_second": rate * cell["tokens"]}
