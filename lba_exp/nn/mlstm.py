"""mLSTM, the matrix memory of xLSTM, bidirectional: forget gates as decays, exponential input gates on the keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lba_exp import ops
from lba_exp.nn.checks import check_heads, check_positive
from lba_exp.nn.gates import Gate, SelectiveGate, linear_at_least_float32
from lba_exp.nn.head_norms import HeadNorm
from lba_exp.nn.mixer import OperatorMixer
from lba_exp.nn.scans import direction_of_layer

LARGEST = 60.0  # of the stabiliser where it bounds the denominator: exp(-60) and what is divided by it stay within float32


class InputGate(Gate):
    """log i = W x + b, one number per token and head, of either sign: (B, L, heads), in at least float32 under every precision.

    b ~ N(0, 0.1^2), as published, and W ~ N(0, 0.1^2 / width), like the forget gate's.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.projection = nn.Linear(width, heads)
        nn.init.normal_(self.projection.weight, std=0.1 / math.sqrt(width))
        nn.init.normal_(self.projection.bias, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return linear_at_least_float32(x, self.projection)


class MLSTM(OperatorMixer):
    """mLSTM (xLSTM, arXiv 2405.04517, equations 19 to 27) in both directions, the token's own term counted once::

        C_i = f_i C_{i-1} + exp(a_i) k_i v_i^T / sqrt(d),    n_i = f_i n_{i-1} + exp(a_i) k_i / sqrt(d)
        y_i = q_i^T C_i / max(|q_i . n_i|, 1)

    with f = sigmoid(W_f x + b_f) and a = W_i x + b_i for each head; C and n of the two directions are added up before the division. Then
    norm of each head, the output gate sigmoid(W_o x + b_o), and the output projection. The causal convolution, the up-projection and the
    skip of xLSTM's block around this layer are left out: the blocks here are those of every mixer.

    So that exp(a) does not overflow, keys are multiplied by exp(a - m), and 1 becomes exp(-m): numerator and denominator are the equations'
    times exp(-m), and the quotient is theirs, whatever m. Here m = max(0, max_j a_j), of each sequence and head (over real tokens, and
    over all of them in a model of one direction, too, as it cancels); with it both exp(a - m) and exp(-m) are at most 1. In float32 a key
    whose a lies about 90 below m is lost, and where m exceeds 60, exp(-60) takes the place of exp(-m).

    Args:
        width: features per token, in and out.
        heads: heads; divides width. Keys and values of a head have d = width / heads features each.
        direction: ``"both"``, ``"forward"``, ``"backward"``, or ``"alternating"`` (by ``layer``: even ones forward, odd ones backward).
        form: ``"parallel"``, ``"recurrent"``, ``"chunkwise"``, ``"fused"`` (on a GPU) or ``"auto"``.
        chunk_size: tokens per chunk of the chunkwise form.
        gate_init: how forget gates start: ``"timescales"``, ``"random"`` or ``"retnet"``, see ``lba_exp.nn.gates``. (Published biases, from
            3 to 6, are memories of 21 to 404 tokens.)
        norm_eps: added to the norm's variance.
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
        gate_init: str = "timescales",
        norm_eps: float = 1e-5,
        layer: int = 0,
    ):
        super().__init__()
        check_heads(width, heads)
        check_positive(chunk_size=chunk_size)
        self.heads, self.chunk_size = heads, chunk_size
        self.key_width = self.value_width = width // heads
        self.direction = direction_of_layer(direction, layer)
        self.qkv = nn.Linear(width, 3 * width)
        self.gate = SelectiveGate(width, heads, gate_init)
        self.input_gate = InputGate(width, heads)
        self.norm = HeadNorm(heads, width, eps=norm_eps)
        self.output_gate = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.form = form

    @property
    def state_size(self) -> int:
        """Numbers that a stream holds per sequence: C, n and a running m of every direction."""
        return len(self.directions) * self.heads * (self.key_width * (self.value_width + 1) + 1)

    def operands(self, x: Tensor, padding_mask: Tensor | None = None) -> dict:
        """The keyword arguments of ``lba_exp.ops.bidirectional_linear_attention``, all but ``form``; the layer divides by itself, and so
        calls ``bidirectional_linear_attention_parts`` with all but ``scaled``.

        Args:
            x: (B, L, width).
            padding_mask: (B, L) bool, True at real tokens; or None.

        Returns:
            q, k, v of one dtype (that of autocast, where it is on), the decays in float32 (float64 for a float64 model), and settings.
        """
        return self._operands(x, padding_mask)[0]

    @staticmethod
    def stabiliser(log_input: Tensor) -> Tensor:
        """m, (B, 1, heads), of the input gates' logarithms (B, L, heads); without a gradient, as no result depends on it."""
        return log_input.detach().amax(1, keepdim=True).clamp_min(0)

    def _operands(self, x: Tensor, padding_mask: Tensor | None) -> tuple[dict, Tensor]:
        """Those operands, and the least denominator exp(-m), (B, 1, heads)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.key_width)).unbind(2)
        log_input = self.input_gate(x)
        if padding_mask is not None:
            log_input = log_input.masked_fill(~padding_mask[:, :, None], -torch.inf)
        m = self.stabiliser(log_input)
        written = torch.exp(log_input - m) * self.key_width**-0.5
        operands = {
            "q": q,
            "k": (k * written[..., None]).to(v.dtype),
            "v": v,
            "scaled": True,
            **self.common_operands(self.gate(x), padding_mask),
        }
        return operands, torch.exp(-m.clamp_max(LARGEST))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width). What stands at padded positions does not matter to the others, at either end."""
        operands, least = self._operands(x, padding_mask)
        del operands["scaled"]
        num, den = ops.bidirectional_linear_attention_parts(**operands, form=self.form)
        y = num / torch.maximum(den.abs(), least)[..., None]
        y = self.norm(y.to(operands["v"].dtype).flatten(2))
        return self.output(y * torch.sigmoid(self.output_gate(x)))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, direction={self.direction}, form={self.form}"
