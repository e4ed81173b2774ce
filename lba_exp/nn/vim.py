"""Vision Mamba's mixer: two selective scans, from both ends."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp import ops
from lba_exp.nn.checks import check_heads, check_positive
from lba_exp.nn.convolution import TokenConvolution
from lba_exp.nn.gates import at_least_float32, linear_at_least_float32
from lba_exp.nn.mixer import OperatorMixer
from lba_exp.nn.scans import direction_of_layer
from lba_exp.nn.state_space import step_biases


class Rates(nn.Module):
    """A = -exp(a), (channels, state) in at least float32: -1, ..., -state for each channel at the start (S4D's real initialisation)."""

    weight_decay_exempt = True

    def __init__(self, channels: int, state: int):
        super().__init__()
        self.log_rate = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(channels, 1))

    def forward(self) -> Tensor:
        return -at_least_float32(self.log_rate).exp()


class S6(nn.Module):
    """One direction of Vision Mamba: convolution, SiLU, and what the selective scan takes (Mamba, arXiv 2312.00752, algorithm 2).

    Delta = softplus(W_2 W_1 x + b), B and C are linear in x, A are ``Rates``.
    """

    def __init__(self, channels: int, state: int, rank: int, convolution: int, direction: str):
        super().__init__()
        self.direction = direction
        self.parts = (rank, state, state)
        self.convolution = TokenConvolution(channels, convolution, direction)
        self.input = nn.Linear(channels, sum(self.parts), bias=False)
        self.steps = nn.Linear(rank, channels)
        nn.init.uniform_(self.steps.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.steps.bias.copy_(step_biases(channels))
        self.rates = Rates(channels, state)
        self.skip = nn.Parameter(torch.ones(channels))

    def operands(self, x: Tensor, padding_mask: Tensor | None) -> dict:
        """(B, L, channels) -> keyword arguments of ``lba_exp.ops.selective_scan``, all but ``form`` and ``chunk_size``."""
        x = F.silu(self.convolution(x, padding_mask))
        steps, b, c = self.input(x).split(self.parts, dim=-1)
        delta = F.softplus(linear_at_least_float32(steps, self.steps))
        return {"x": x, "delta": delta, "a": self.rates(), "b": b, "c": c, "direction": self.direction, "padding_mask": padding_mask}


class Vim(OperatorMixer):
    """Vision Mamba's mixer (arXiv 2401.09417, section 3.2): z gates the sum of two S6 scans, one from each end.

    Each direction has a convolution, B, C, Delta, A and D of its own; both are summed as they are, so that a token's own term counts in
    both. One direction alone is Mamba's block.

    Args:
        width: features per token, in and out.
        heads: changes nothing: each channel has a state of its own. Divides width, as in the other mixers.
        direction: ``"both"``, ``"forward"``, ``"backward"``, or ``"alternating"`` (by ``layer``: even ones forward, odd ones backward).
        form: the form to compute in: one of ``forms``, ``"fused"`` (on a GPU) or ``"auto"``.
        chunk_size: tokens per chunk of the chunkwise form.
        expand: channels over width.
        state: numbers of a channel's state.
        convolution: tokens that the convolution reads, the token itself and those before it as the direction reads.
        layer: index of the layer, for ``direction="alternating"``.

    Raises:
        ValueError: for a value that is not valid.
    """

    operator = staticmethod(ops.selective_scan)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        direction: str = "both",
        form: str = "parallel",
        chunk_size: int = 64,
        expand: int = 2,
        state: int = 16,
        convolution: int = 4,
        layer: int = 0,
    ):
        super().__init__()
        check_heads(width, heads)
        check_positive(chunk_size=chunk_size, expand=expand, state=state, convolution=convolution)
        channels, rank = expand * width, math.ceil(width / 16)
        self.heads, self.key_width, self.value_width, self.chunk_size = channels, state, 1, chunk_size
        self.direction = direction_of_layer(direction, layer)
        self.input = nn.Linear(width, 2 * channels, bias=False)
        self.scans = nn.ModuleList(S6(channels, state, rank, convolution, name) for name in self.directions)
        self.output = nn.Linear(channels, width, bias=False)
        self.form = form

    @staticmethod
    def call_shape(operands: dict) -> tuple[int, int, int, int, int]:
        """As of linear attention with a head for each channel."""
        return (*operands["x"].shape, operands["b"].shape[-1], 1)

    @staticmethod
    def call_decays(operands: dict) -> dict[str, Tensor | None]:
        """All channels together, as one head."""
        decay = (operands["delta"][..., None] * operands["a"]).flatten(2)[:, :, None]
        return {"forward": None, "backward": None} | {operands["direction"]: decay}

    def fused_obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return ops.selective_scan_obstacle(device, dtype, self.key_width)

    def operands(self, x: Tensor, padding_mask: Tensor | None = None) -> list[dict]:
        """The keyword arguments of ``lba_exp.ops.selective_scan``, all but ``form``, of a call for each direction.

        Args:
            x: (B, L, width).
            padding_mask: (B, L) bool, True at real tokens; or None.
        """
        inside = self.input(x)[..., : self.heads]
        return [scan.operands(inside, padding_mask) | {"chunk_size": self.chunk_size} for scan in self.scans]

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width). What stands at padded positions does not matter to the others, at either end."""
        inside, z = self.input(x).chunk(2, dim=-1)
        y = 0
        for scan in self.scans:
            call = scan.operands(inside, padding_mask) | {"chunk_size": self.chunk_size}
            y = y + self.operator(**call, form=self.form) + scan.skip * call["x"]
        return self.output(y * F.silu(z))

    def extra_repr(self) -> str:
        return f"state={self.key_width}, direction={self.direction}, form={self.form}"
