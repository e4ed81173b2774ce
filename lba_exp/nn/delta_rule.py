"""DeltaNet and Gated DeltaNet, bidirectional: a layer around the delta rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp import ops
from lba_exp.nn.checks import check_heads, check_positive
from lba_exp.nn.convolution import TokenConvolution
from lba_exp.nn.gates import linear_at_least_float32
from lba_exp.nn.head_norms import RMSNorm
from lba_exp.nn.mixer import OperatorMixer
from lba_exp.nn.scans import direction_of_layer
from lba_exp.nn.state_space import StepSizes

EPS = 1e-6  # added to squared lengths of queries and keys


class DeltaRule(OperatorMixer):
    """DeltaNet (arXiv 2406.06484), or with decay and output gate Gated DeltaNet (arXiv 2412.06464), in both directions.

    Queries, keys and values: projection, depthwise convolution over tokens, SiLU; queries and keys of a head are then brought to length 1,
    queries scaled by Dk^-0.5. Beta = sigmoid(W x). After the operator RMS norm of each head, the gate SiLU(W x) where ``gated``, and the
    output projection. No projection but that of the decay (``StepSizes``) has a bias, as published.

    Args:
        width: features per token, in and out.
        heads: heads; divides width. Keys and values of a head have width / heads features each.
        direction: ``"both"``, ``"forward"``, ``"backward"``, or ``"alternating"`` (by ``layer``: even ones forward, odd ones backward).
        form: ``"parallel"``, ``"recurrent"``, ``"chunkwise"`` or ``"auto"``.
        chunk_size: tokens per chunk of the chunkwise form.
        gated: decay states by exp(-exp(a) softplus(W x + b)), and gate the output.
        convolution: tokens that the convolution reads: centred, so an odd number, for both directions; for one, the token itself and those
            before it as that direction reads (the causal models' is 4). 0: none.
        norm_eps: added to the mean square of that norm.
        layer: index of the layer, for ``direction="alternating"``.

    Raises:
        ValueError: for a value that is not valid.
    """

    operator = staticmethod(ops.bidirectional_delta_rule)
    kernels = False

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        direction: str = "both",
        form: str = "parallel",
        chunk_size: int = 64,
        gated: bool = False,
        convolution: int = 3,
        norm_eps: float = 1e-5,
        layer: int = 0,
    ):
        super().__init__()
        check_heads(width, heads)
        check_positive(chunk_size=chunk_size)
        if not isinstance(gated, bool):
            raise ValueError(f"gated: expected True or False, got {gated!r}")
        if isinstance(convolution, bool) or not isinstance(convolution, int) or convolution < 0:
            raise ValueError(f"convolution: expected an integer >= 0, got {convolution!r}")
        self.heads, self.chunk_size = heads, chunk_size
        self.key_width = self.value_width = width // heads
        self.direction = direction_of_layer(direction, layer)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.convolution = TokenConvolution(3 * width, convolution, self.direction, bias=False) if convolution else None
        self.beta = nn.Linear(width, heads, bias=False)
        self.gate = StepSizes(width, heads) if gated else None
        self.norm = RMSNorm(self.value_width, eps=norm_eps)
        self.output_gate = nn.Linear(width, width, bias=False) if gated else None
        self.output = nn.Linear(width, width, bias=False)
        self.form = form

    def operands(self, x: Tensor, padding_mask: Tensor | None = None) -> dict:
        """The keyword arguments of ``lba_exp.ops.bidirectional_delta_rule``, all but ``form``.

        Args:
            x: (B, L, width).
            padding_mask: (B, L) bool, True at real tokens; or None.

        Returns:
            q, k, v of one dtype (that of autocast, where it is on), beta and the decays in float32 (float64 for a float64 model), settings.
        """
        qkv = self.qkv(x)
        dtype = qkv.dtype
        if self.convolution is not None:
            qkv = self.convolution(qkv, padding_mask)
        q, k, v = F.silu(qkv).unflatten(-1, (3, self.heads, self.key_width)).unbind(2)
        return {
            "q": (_unit(q) * self.key_width**-0.5).to(dtype),
            "k": _unit(k).to(dtype),
            "v": v.to(dtype),
            "beta": torch.sigmoid(linear_at_least_float32(x, self.beta)),
            **self.common_operands(None if self.gate is None else self.gate(x)[0][1], padding_mask),
        }

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width). What stands at padded positions does not matter to the others, at either end."""
        y = self.norm(self.operator(**self.operands(x, padding_mask), form=self.form)).flatten(2)
        if self.output_gate is not None:
            y = y * F.silu(self.output_gate(x))
        return self.output(y)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, gated={self.gate is not None}, direction={self.direction}, form={self.form}"


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1, in at least float32; 0 stays 0, with a finite gradient."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
