"""Modules compiled whole, for any shape or for each shape by itself with their kernels recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lba_exp.nn.blocks import GRAPHS


class CompiledModule:
    """Runs a module compiled where that is asked for, and leaves it as it is otherwise.

    Args:
        module: the module; its hooks run as they are.
        graphs: compile for every shape of the inputs by itself and, on CUDA, record the kernels as a CUDA graph: the first call with a
            shape compiles, the second one records. What a recorded module gives back is overwritten by its next call, and so are
            gradients that its backward pass made, see ``own_gradients``. Elsewhere the module is compiled alone.
        clone: what it gives back (a tensor) is copied out of the graph's memory, and stays.
    """

    def __init__(self, module: nn.Module, *, graphs: bool = False, clone: bool = False):
        self._module = module
        self._settings: dict[str, Any] = {"recompile_limit": GRAPHS}
        if graphs:
            # parts for the buckets of DDP would have graphs of their own, whose weights are copied in every step
            self._settings["optimize_ddp"] = False
        run = torch.compile(module.forward, **({"dynamic": False, "mode": "reduce-overhead"} if graphs else {}))
        self._run = (lambda *arguments, **named: run(*arguments, **named).clone()) if clone else run

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, calls of the module run it compiled."""
        self._module.forward = self._run
        try:
            with torch._dynamo.config.patch(self._settings):
                yield
        finally:
            del self._module.forward


def own_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Moves gradients out of a CUDA graph's memory, so that further backward passes add to them instead of overwriting them."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient]
    copies = [torch.empty_like(gradient) for gradient in gradients]
    torch._foreach_copy_(copies, gradients)
    for parameter, copy in zip(with_gradient, copies, strict=True):
        parameter.grad = copy
