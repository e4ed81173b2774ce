"""HGRN-2, bidirectional: a gated linear recurrence whose keys are what its forget gates leave open."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.nn.checks import check_heads, check_positive
from lba_exp.nn.gates import SelectiveVectorGate
from lba_exp.nn.head_norms import make_head_norm
from lba_exp.nn.mixer import OperatorMixer
from lba_exp.nn.scans import direction_of_layer
from lba_exp.ops.checks import choice


class HGRN2(OperatorMixer):
    """HGRN-2 (arXiv 2404.07904) in both directions, the token's own term counted once::

        S_i = diag(lambda_i) S_{i-1} + (1 - lambda_i) v_i^T,    y_i = q_i^T S_i
        lambda = sigmoid(W x + b) per key channel,    v = SiLU(W_v x + b_v),    q = sigmoid(W_q x + b_q)

    The output gate of HGRN (arXiv 2311.04823) is the query, one minus its forget gate the key, its input the value. Then layer norm and the
    output projection, as there. Rows of S are weighted means of values, so that nothing else is scaled.

    Published forget gates have a lower bound, lambda = bound + (1 - bound) sigmoid(.), which grows from layer to layer: the running sum of
    a softmax over all layers, learned for each channel. A layer here does not know the others, and it is left out; the initial memory
    lengths (``gate_init``) do its work, in every layer alike.

    Args:
        width: features per token, in and out.
        heads: heads; divides width. Keys and values of a head have width / heads features each.
        direction: ``"both"``, ``"forward"``, ``"backward"``, or ``"alternating"`` (by ``layer``: even ones forward, odd ones backward).
        form: ``"parallel"``, ``"recurrent"``, ``"chunkwise"`` or ``"auto"``.
        chunk_size: tokens per chunk of the chunkwise form.
        gate_init: how decays start: ``"timescales"`` or ``"random"``, see ``lba_exp.nn.gates``.
        norm_eps: added to that norm's variance.
        layer: index of the layer, for ``direction="alternating"``.

    Raises:
        ValueError: for a value that is not valid.
    """

    per_channel = True

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
        choice("gate_init", gate_init, ("timescales", "random"))
        self.heads, self.chunk_size = heads, chunk_size
        self.key_width = self.value_width = width // heads
        self.direction = direction_of_layer(direction, layer)
        self.qv = nn.Linear(width, 2 * width)
        self.gate = SelectiveVectorGate(width, heads, gate_init)
        self.norm = make_head_norm("layer", width, heads, norm_eps)
        self.output = nn.Linear(width, width)
        self.form = form

    def operands(self, x: Tensor, padding_mask: Tensor | None = None) -> dict:
        """The keyword arguments of ``lba_exp.ops.bidirectional_linear_attention``, all but ``form``.

        Args:
            x: (B, L, width).
            padding_mask: (B, L) bool, True at real tokens; or None.

        Returns:
            q, k, v of one dtype (that of autocast, where it is on), the decays in float32 (float64 for a float64 model), and settings.
        """
        q, v = self.qv(x).unflatten(-1, (2, self.heads, self.key_width)).unbind(2)
        log_gate = self.gate(x)
        return {
            "q": torch.sigmoid(q),
            "k": -torch.expm1(log_gate).to(v.dtype),
            "v": F.silu(v),
            "scaled": False,
            **self.common_operands(log_gate, padding_mask),
        }

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width). What stands at padded positions does not matter to the others, at either end."""
        y = self.operator(**self.operands(x, padding_mask), form=self.form)
        return self.output(self.norm(y.flatten(2)))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, direction={self.direction}, form={self.form}"
