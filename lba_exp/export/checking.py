"""A written file against the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lba_exp import ops
from lba_exp.errors import UserError
from lba_exp.export.inputs import BATCH, Inputs

TOLERANCE = 1e-4
BATCHES = (1, 2, 5)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the 2-norm, in float64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


def whole_errors(run: Callable[..., Tensor], model: nn.Module, inputs: Inputs, lengths: list[int], batch: int | None) -> dict[str, float]:
    """The relative error of the outputs at each length, or, where the length is fixed, for each of three batches."""
    cases = [(BATCHES[n % len(BATCHES)], length, f"length {length}") for n, length in enumerate(lengths)]
    if not cases:
        cases = [(size, inputs.fixed, f"batch {n + 1}" if batch else f"batch of {size}") for n, size in enumerate(BATCHES)]
    errors = {}
    for seed, (size, length, name) in enumerate(cases, start=1):
        example = inputs.example(batch or size, length, seed)
        with torch.no_grad():
            errors[name] = relative_error(run(*example), model(*example))
    return errors


def model_step_errors(
    run: Callable[..., Any],
    model: nn.Module,
    inputs: Inputs,
    states: list[dict[str, Any]],
    block: int,
    blocks: list[int],
    batch: int | None,
) -> dict[str, float]:
    """The relative error of all outputs of so many steps, one after the other, against the model on the whole sequence."""
    errors = {}
    for seed, count in enumerate(blocks, start=1):
        (tokens,) = inputs.example(batch or BATCHES[seed % len(BATCHES)], count * block, seed)
        state, found = start_state(states, len(tokens)), []
        with torch.no_grad():
            for part in tokens.split(block, dim=1):
                logits, state = run(part, state)
                found.append(logits)
            errors[f"length {count * block}"] = relative_error(torch.cat(found, dim=1), model(tokens))
    return errors


def operator_step_errors(
    run: dict[str, Callable[..., Any]], calls: dict[str, dict[str, Any]], block: int, blocks: list[int], batch: int | None
) -> dict[str, float]:
    """The relative error of numerators and denominators of one call of an operator, its directions stepped apart and added up.

    run, calls: the graph of each direction, and what ``steps.operators`` says of it.
    """
    errors = {}
    for seed, count in enumerate(blocks, start=1):
        generator = torch.Generator().manual_seed(seed)
        sizes, drawn = {BATCH: batch or BATCHES[seed % len(BATCHES)]}, {}
        for direction, call in calls.items():
            for given in call["inputs"][1:]:
                free = given["shape"][0] == BATCH
                shape = [sizes[BATCH], count * block, *given["shape"][2:]] if free else given["shape"]
                name = f"{direction}_log_decay" if given["name"] == "log_decay" else given["name"]
                x = torch.rand(shape, generator=generator, dtype=getattr(torch, given["dtype"]))
                drawn[name] = -0.3 * x if name.endswith("decay") else drawn.get(name, x)
        total = None
        for direction, call in calls.items():
            found, (state,) = [], start_state(call["inputs"][:1], sizes[BATCH])
            names = [f"{direction}_log_decay" if given["name"] == "log_decay" else given["name"] for given in call["inputs"][1:]]
            order = range(count) if direction == "forward" else reversed(range(count))
            for number in order:
                part = slice(number * block, (number + 1) * block)
                with torch.no_grad():
                    state, num, den = run[direction](state, *(x[:, part] if (x := drawn[name]).ndim > 2 else x for name in names))
                found.append(torch.cat([num, den[..., None]], dim=-1))
            found = torch.cat(found if direction == "forward" else found[::-1], dim=1)
            total = found if total is None else total + found
        settings = {"direction": "both" if len(calls) == 2 else next(iter(calls)), "form": "recurrent"}
        weight = sum(call["diagonal_weight"] for call in calls.values())
        num, den = ops.bidirectional_linear_attention_parts(**drawn, **settings, diagonal_weight=weight)
        errors[f"length {count * block}"] = relative_error(total, torch.cat([num, den[..., None]], dim=-1))
    return errors


def start_state(states: list[dict[str, Any]], batch: int) -> tuple[Tensor, ...]:
    """Zeros for each part of a state: what stands before the first token."""
    shapes = [[batch if size == BATCH else size for size in part["shape"]] for part in states]
    return tuple(torch.zeros(shape, dtype=getattr(torch, part["dtype"])) for shape, part in zip(shapes, states, strict=True))


def check_errors(errors: dict[str, float], what: str) -> None:
    """Raises UserError where one is above 1e-4, or not a number."""
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    if not errors[worst] <= TOLERANCE:
        raise UserError(f"{what} differs from the model by {errors[worst]:.1e} at {worst} (at most {TOLERANCE:.0e}): no file was written.")
