"""Hydra: a quasiseparable mixer, two shifted state spaces and a diagonal of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.nn.checks import check_positive
from lba_exp.nn.convolution import TokenConvolution
from lba_exp.nn.head_norms import RMSNorm
from lba_exp.nn.mixer import OperatorMixer
from lba_exp.nn.scans import direction_of_layer
from lba_exp.nn.state_space import StepSizes, inner_width


class Hydra(OperatorMixer):
    """Hydra (arXiv 2407.09941, section 3)::

        y = shift(SSD(x)) + flip(shift(SSD(flip(x)))) + (W_D x + D) x

    SSD is Mamba-2's state space, S_i = exp(-Delta_i exp(a)) S_{i-1} + Delta_i B_i x_i^T, out_i = C_i^T S_i; shifted by one token, so that a
    token's own term is that of the diagonal alone, which depends on the token. Each direction has B, C and Delta of its own; x, a and the
    bias of Delta are shared. x, B and C go through one symmetric convolution and SiLU; then RMSNorm(y) * SiLU(z), and the output
    projection.

    One direction alone keeps its own of the two terms and the diagonal, with a convolution to its own side.

    Args:
        width: features per token, in and out.
        heads: heads; divides expand * width.
        direction: ``"both"``, ``"forward"``, ``"backward"``, or ``"alternating"`` (by ``layer``: even ones forward, odd ones backward).
        form: the form to compute in: one of ``forms``, ``"fused"`` (on a GPU, widths up to 128) or ``"auto"``.
        chunk_size: tokens per chunk of the chunkwise form.
        expand: features inside over width.
        state: features of B and C.
        convolution: tokens that the convolution reads; odd for both directions.
        norm_eps: added to the mean square of the norm.
        layer: index of the layer, for ``direction="alternating"``.

    Raises:
        ValueError: for a value that is not valid.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        direction: str = "both",
        form: str = "parallel",
        chunk_size: int = 64,
        expand: int = 2,
        state: int = 64,
        convolution: int = 7,
        norm_eps: float = 1e-5,
        layer: int = 0,
    ):
        super().__init__()
        inner = inner_width(width, heads, expand, state)
        check_positive(chunk_size=chunk_size, convolution=convolution)
        self.heads, self.chunk_size = heads, chunk_size
        self.key_width, self.value_width = state, inner // heads
        self.direction = direction_of_layer(direction, layer)
        self.parts = (inner, *[state] * 2 * len(self.directions))
        self.input = nn.Linear(width, inner + sum(self.parts), bias=False)
        self.convolution = TokenConvolution(sum(self.parts), convolution, self.direction)
        self.gate = StepSizes(width, heads, len(self.directions))
        self.diagonal = nn.Linear(inner, heads, bias=False)
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner, eps=norm_eps)
        self.output = nn.Linear(inner, width, bias=False)
        self.form = form

    def operands(self, x: Tensor, padding_mask: Tensor | None = None) -> list[dict]:
        """The keyword arguments of ``lba_exp.ops.bidirectional_linear_attention``, all but ``form``, of a call for each direction.

        Args:
            x: (B, L, width).
            padding_mask: (B, L) bool, True at real tokens; or None.

        Returns:
            q, k (one for all heads, expanded), v of one dtype (that of autocast, where it is on), the decays in float32 (float64 for a
            float64 model), and settings.
        """
        return self._project(x, padding_mask)[0]

    def _project(self, u: Tensor, padding_mask: Tensor | None) -> tuple[list[dict], Tensor, Tensor]:
        """The operands; x, (B, L, inner); and z, (B, L, inner)."""
        z, mixed = self.input(u).split([self.parts[0], sum(self.parts)], dim=-1)
        x, *keys_and_queries = F.silu(self.convolution(mixed, padding_mask)).split(self.parts, dim=-1)
        values = x.unflatten(-1, (self.heads, -1))
        calls = []
        for i, (direction, (steps, log_decay)) in enumerate(zip(self.directions, self.gate(u), strict=True)):
            b, c = keys_and_queries[2 * i : 2 * i + 2]
            calls.append(
                {
                    "q": c[:, :, None].expand(-1, -1, self.heads, -1),
                    "k": b[:, :, None].expand(-1, -1, self.heads, -1),
                    "v": (steps[..., None] * values).to(x.dtype),
                    f"{direction}_log_decay": log_decay,
                    "scaled": False,
                    "direction": direction,
                    "padding_mask": padding_mask,
                    "chunk_size": self.chunk_size,
                }
            )
        return calls, x, z

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width). What stands at padded positions does not matter to the others, at either end."""
        calls, inside, z = self._project(x, padding_mask)
        y = (self.diagonal(inside) + self.skip)[..., None] * inside.unflatten(-1, (self.heads, -1))
        for call in calls:
            y = y + shifted(self.operator(**call, form=self.form), call["direction"])
        return self.output(self.norm(y.flatten(2)) * F.silu(z))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, state={self.key_width}, direction={self.direction}, form={self.form}"


def shifted(x: Tensor, direction: str) -> Tensor:
    """Each token gets what the one before it as the direction reads had, the first one 0: (B, L, ...) -> (B, L, ...)."""
    first = torch.zeros_like(x[:, :1])
    return torch.cat([first, x[:, :-1]] if direction == "forward" else [x[:, 1:], first], dim=1)
