"""The training step of models of images, in turns: forward pass, loss, backward pass, AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lba_exp import build
from lba_exp.bench.measure import Problem, attempt, release, summary, take_turns
from lba_exp.bench.step_settings import StepSettings
from lba_exp.callbacks.memory import LiveTensors
from lba_exp.data.spec import DataSpec
from lba_exp.nn.blocks import GRAPHS, CompiledBlocks
from lba_exp.nn.compiled import CompiledModule
from lba_exp.nn.decay_groups import weight_decay_groups

CHANNELS = 3
WARM_UP = 3  # steps before memory is measured: the first one compiles and makes the optimizer's state

Cell = dict[str, Any]


class Step:
    """One model with its optimizer and a batch of synthetic images; calling it takes a training step.

    The model is that of ``lba_exp.build`` with weights of seed 0; images are normal, labels uniform. The loss is that of
    ``lba_exp.tasks.classification``, the optimizer AdamW in one kernel (``fused=True``) with the configuration's settings.

    Raises:
        lba_exp.errors.ConfigError: the model does not fit the images.
    """

    def __init__(self, cfg: DictConfig, settings: StepSettings, device: torch.device):
        side, batch = settings.resolution, settings.batch
        torch.manual_seed(0)
        self.model = build.model(cfg.model, data_spec(settings)).to(device).train()
        self._forward = compiled(self.model, settings.compile)
        o = cfg.optim
        groups = weight_decay_groups(self.model, o.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, fused=True)
        self._smoothing = o.label_smoothing
        self._half = settings.dtype == "bfloat16"
        generator = torch.Generator(device).manual_seed(0)
        self.images = torch.randn(batch, CHANNELS, side, side, generator=generator, device=device)
        self.labels = torch.randint(settings.classes, (batch,), generator=generator, device=device)

    def __call__(self) -> Tensor:
        """Takes a step and returns its loss, a scalar; gradients are gone afterwards."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self._half):
            logits = self._forward(self.images)
            loss = nn.functional.cross_entropy(logits.float(), self.labels, label_smoothing=self._smoothing)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @property
    def tokens(self) -> int:
        """Tokens of an image, the class token included."""
        height, width = self.model.grid
        return height * width + (self.model.class_token is not None)

    def resident_bytes(self) -> int:
        """Bytes of weights, optimizer state and batch: what is there between two steps."""
        tensors = [*self.model.parameters(), *self.model.buffers(), self.images, self.labels]
        tensors += [x for x in tree_leaves(list(self.optimizer.state.values())) if isinstance(x, Tensor)]
        return sum(x.nbytes for x in tensors)


def data_spec(settings: StepSettings) -> DataSpec:
    """The synthetic images in numbers."""
    side, classes = settings.resolution, settings.classes
    names = [str(i) for i in range(classes)]
    return DataSpec("synthetic", side * side, classes, names, CHANNELS, None, {"train": settings.batch}, "", grid=(side, side))


def compiled(model: nn.Module, what: str) -> Callable[[Tensor], Tensor]:
    """The model's forward pass, compiled as ``StepSettings.compile`` says."""
    if what == "off":
        return model
    if what == "model":
        return torch.compile(model, dynamic=False)
    switch = CompiledModule(model, graphs=True) if what == "graphs" else CompiledBlocks(model)

    def forward(images: Tensor) -> Tensor:
        with switch():
            return model(images)

    return forward


def measure(
    configurations: Mapping[str, DictConfig],
    settings: StepSettings,
    device: torch.device,
    tell: Callable[[str, int], None],
    afterwards: Callable[[list[Cell], dict[str, Step]], None] = lambda cells, steps: None,
) -> list[Cell]:
    """A cell for each model: built, compiled and warmed up one after the other, then timed in turns.

    A cell holds ``model``, ``form`` (of the linear mixers), ``parameters``, ``tokens`` (of an image), ``batch``, the figures of
    ``measure.summary``, ``over_first`` (time over that of the first model), ``images_per_second``, ``peak_bytes`` (weights, optimizer
    state, batch, activations and gradients of one step) with ``peak_over_first``, ``first_loss``, and ``status`` and ``reason`` where it
    was not measured.

    Args:
        configurations: from ``step_settings.configurations``.
        settings: what they were made from.
        device: the device.
        tell: called with what is done next, and the number of models done since the last call.
        afterwards: called after all turns with the cells and the steps that were measured, while their graphs are there.
    """
    cells, steps = {}, {}
    with fresh_compiler():
        for name, cfg in configurations.items():
            tell(f"{name}: warm-up and memory", 0)
            cell = cells[name] = _head(name, cfg, settings)
            found, problem = attempt(lambda cfg=cfg: _prepare(cfg, settings, device))
            if problem is None:
                steps[name], figures = found
                cell |= figures
            else:
                cell |= {"status": problem.status, "reason": problem.reason}
            del found
            release(device)
            tell("", 1)
        tell("time", 0)
        times, problems = take_turns(steps, settings.repeats, settings.seconds, device)
        for name in steps:
            problem = problems.get(name)
            cells[name] |= _head(name, configurations[name], settings, problem) if problem else _timed(times[name], settings.batch)
        _compare(list(cells.values()))
        afterwards(list(cells.values()), {name: step for name, step in steps.items() if name not in problems})
    return list(cells.values())


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Graphs of all models side by side, as their turns need them: they share the code, which torch keeps but a few graphs of."""
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS):
            yield
    finally:
        torch._dynamo.reset()


def _prepare(cfg: DictConfig, settings: StepSettings, device: torch.device) -> tuple[Step, Cell]:
    step = Step(cfg, settings, device)
    first = step()
    for _ in range(WARM_UP - 1):
        step()
    with LiveTensors(device) as memory:
        step()
    # the pool of a CUDA graph is taken once, before, and shared with the other models'
    seen = memory.bytes is not None and settings.compile != "graphs"
    peak = step.resident_bytes() + memory.bytes if seen else None
    parameters = sum(p.numel() for p in step.model.parameters())
    return step, {
        "parameters": parameters,
        "tokens": step.tokens,
        "form": getattr(step.model, "form", None),
        "peak_bytes": peak,
        "first_loss": float(first),
        "reason": None if first.isfinite() else "the loss is not finite",
    }


def _head(name: str, cfg: DictConfig, settings: StepSettings, problem: Problem | None = None) -> Cell:
    figures = ("form", "parameters", "tokens", "median_ms", "quartile_1_ms", "quartile_3_ms", "calls", "over_first", "images_per_second")
    figures += ("peak_bytes", "peak_over_first", "first_loss")
    status, reason = problem or ("", None)
    return {"model": name, "batch": settings.batch, "status": status, "reason": reason} | dict.fromkeys(figures)


def _timed(times: list[float], batch: int) -> Cell:
    found = summary(times)
    return found | {"status": "measured", "images_per_second": 1e3 * batch / found["median_ms"]}


def _compare(cells: Iterable[Cell]) -> None:
    """Adds each model's time and memory over the first one's."""
    first, *_ = cells
    for cell in cells:
        for figure, ratio in (("median_ms", "over_first"), ("peak_bytes", "peak_over_first")):
            if cell[figure] is not None and first[figure] is not None:
                cell[ratio] = cell[figure] / first[figure]
