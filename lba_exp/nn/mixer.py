"""What mixers share that are calls of a linear operator: the form in which it computes, and what a parity check sees of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lba_exp import ops
from lba_exp.ops.checks import choice
from lba_exp.ops.fused import obstacle


class OperatorMixer(nn.Module):
    """Base of token mixers around a linear operator: (B, L, width) -> (B, L, width), the same weights in one of several forms.

    A subclass is called as ``mixer(x, padding_mask)``, makes the operator's arguments in ``operands``, sets the attributes without a value
    below, and last ``self.form``, once its weights are there. ``layer.form = "recurrent"`` switches: same weights, same outputs.

    Attributes:
        heads, chunk_size, direction: as of the operator.
        operator: the function whose keyword arguments ``operands`` gives, with ``form`` beside them.
        kernels: whether that function has the form "fused" on a GPU, where decays and widths allow it.
        per_channel: decays have one value per key channel, not one per head.
        expanding: a decay may exceed 1, so that the parallel form alone can run.
        key_width, value_width: features of a head's keys and of its values.
    """

    operator: Callable[..., Tensor] = staticmethod(ops.bidirectional_linear_attention)
    kernels = True
    per_channel = False
    expanding = False
    heads: int
    chunk_size: int
    direction: str
    key_width: int
    value_width: int

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions that tokens are read in: "forward", "backward" or both."""
        return ("forward", "backward") if self.direction == "both" else (self.direction,)

    @property
    def state_size(self) -> int:
        """Numbers that the recurrent form holds per sequence: S of every direction."""
        return len(self.directions) * self.heads * self.key_width * self.value_width

    def common_operands(self, log_gate: Tensor | None, padding_mask: Tensor | None) -> dict[str, Any]:
        """What a call of the operator has beside queries, keys and values: decays in the convention "query", where a direction has one,
        direction, mask and chunk size.

        Args:
            log_gate: as ``ops.step_log_decays`` takes it; or None.
            padding_mask: (B, L) bool, True at real tokens; or None.
        """
        decays = zip(("forward", "backward"), ops.step_log_decays(log_gate, "query"), strict=True)
        own = {f"{name}_log_decay": decay if name in self.directions else None for name, decay in decays}
        return {**own, "direction": self.direction, "padding_mask": padding_mask, "chunk_size": self.chunk_size}

    def operands(self, x: Tensor, padding_mask: Tensor | None = None) -> dict | list[dict]:
        """The keyword arguments of ``operator``, all but ``form``; a list of one for each call, where there are several.

        Args:
            x: (B, L, width).
            padding_mask: (B, L) bool, True at real tokens; or None.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it gives to its operator")

    @staticmethod
    def call_shape(operands: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
        """(sequences, length, heads, key width, value width) of one call of the operator."""
        return (*operands["q"].shape, operands["v"].shape[-1])

    @staticmethod
    def call_decays(operands: Mapping[str, Any]) -> dict[str, Tensor | None]:
        """Log decays of one call, by direction: (H,), (H, Dk), (B, L, H) or (B, L, H, Dk); None where there is no decay."""
        return {direction: operands.get(f"{direction}_log_decay") for direction in ("forward", "backward")}

    def fused_obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the form "fused" cannot run there on operands of this dtype, and what to do, in a sentence; None where it can."""
        if not self.kernels:
            return f"form: {type(self).__name__} has no kernels for 'fused'; use 'chunkwise' or 'auto'"
        return obstacle(device, dtype, self.per_channel, self.key_width, self.value_width)

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms in which the layer computes the same outputs where its weights are: "fused" among them on a GPU that can run it."""
        if self.expanding:
            return ("parallel",)
        weight = next(self.parameters())
        fused = weight.device.type == "cuda" and self.fused_obstacle(weight.device, weight.dtype) is None
        return (*ops.MODEL_FORMS, "fused") if fused else tuple(ops.MODEL_FORMS)

    @property
    def form(self) -> str:
        return self._form

    @form.setter
    def form(self, form: str) -> None:
        further = () if self.expanding else ("fused", "auto") if self.kernels and not self.per_channel else ("auto",)
        choice("form", form, tuple(dict.fromkeys((*self.forms, *further))))  # "fused" before the weights are on a GPU, too
        self._form = form
