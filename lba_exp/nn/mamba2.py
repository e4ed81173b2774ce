"""Mamba-2, bidirectional: a state space with one decay per head, as linear attention."""

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


class Mamba2(OperatorMixer):
    """Mamba-2 (arXiv 2405.21060, section 7 and equation 1) in both directions, the token's own term counted once::

        S_i = exp(-Delta_i exp(a)) S_{i-1} + Delta_i B_i x_i^T,    y_i = C_i^T S_i + D x_i,    Delta = softplus(W u + b)

    x, B and C go through a depthwise convolution and SiLU; B and C are shared by all heads (keys and queries); then RMSNorm(y * SiLU(z))
    and the output projection, without biases, as published.

    Args:
        width: features u per token, in and out.
        heads: heads; divides expand * width.
        direction: ``"both"``, ``"forward"``, ``"backward"``, or ``"alternating"`` (by ``layer``: even ones forward, odd ones backward).
        form: the form to compute in: one of ``forms``, ``"fused"`` (on a GPU, widths up to 128) or ``"auto"``.
        chunk_size: tokens per chunk of the chunkwise form.
        expand: features inside over width.
        state: features of B and C (published: 128).
        convolution: tokens that the convolution reads: centred, so an odd number, for both directions; for one, the token itself and those
            before it as that direction reads (published: 4).
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
        self.parts = (inner, state, state)
        self.direction = direction_of_layer(direction, layer)
        self.input = nn.Linear(width, 2 * inner + 2 * state, bias=False)
        self.convolution = TokenConvolution(inner + 2 * state, convolution, self.direction)
        self.gate = StepSizes(width, heads)
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner, eps=norm_eps)
        self.output = nn.Linear(inner, width, bias=False)
        self.form = form

    def operands(self, x: Tensor, padding_mask: Tensor | None = None) -> dict:
        """The keyword arguments of ``lba_exp.ops.bidirectional_linear_attention``, all but ``form``.

        Args:
            x: (B, L, width).
            padding_mask: (B, L) bool, True at real tokens; or None.

        Returns:
            q, k (one for all heads, expanded), v of one dtype (that of autocast, where it is on), the decays in float32 (float64 for a
            float64 model), and settings.
        """
        return self._project(x, padding_mask)[0]

    def _project(self, u: Tensor, padding_mask: Tensor | None) -> tuple[dict, Tensor, Tensor]:
        """The operands; x, (B, L, heads, Dv); and z, (B, L, inner)."""
        inner = self.parts[0]
        z, mixed = self.input(u).split([inner, sum(self.parts)], dim=-1)
        x, b, c = F.silu(self.convolution(mixed, padding_mask)).split(self.parts, dim=-1)
        x = x.unflatten(-1, (self.heads, -1))
        ((steps, log_decay),) = self.gate(u)
        operands = {
            "q": c[:, :, None].expand(-1, -1, self.heads, -1),
            "k": b[:, :, None].expand(-1, -1, self.heads, -1),
            "v": (steps[..., None] * x).to(x.dtype),
            "scaled": False,
            **self.common_operands(log_decay, padding_mask),
        }
        return operands, x, z

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width). What stands at padded positions does not matter to the others, at either end."""
        operands, inside, z = self._project(x, padding_mask)
        y = self.operator(**operands, form=self.form) + self.skip[:, None] * inside
        return self.output(self.norm(y.flatten(2) * F.silu(z)))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, state={self.key_width}, direction={self.direction}, form={self.form}"
