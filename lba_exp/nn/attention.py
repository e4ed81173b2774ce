"""One layer for every linear mixer, put together from named parts."""

from __future__ import annotations

from torch import Tensor, nn

from lba_exp import ops
from lba_exp.nn.checks import check_heads, check_positive
from lba_exp.ops.checks import choice
from lba_exp.registry import FEATURE_MAPS, GATES

SCALES = ("after", "none")


class LinearAttention(nn.Module):
    """Bidirectional linear attention: Y = Scale(phi(Q) phi(K)^T (.) M) V, then an output projection (arXiv 2502.16249, section 3).

    The mask M holds the products of the decays between two tokens. The form in which that is computed (parallel, recurrent,
    chunkwise) is a switch, ``layer.form = "recurrent"``: same weights, same outputs.

    Args:
        width: features per token, in and out.
        heads: heads; divides width. Keys and values of a head have width / heads features each.
        feature_map: phi, on queries and keys: a name in ``lba_exp.registry.FEATURE_MAPS``.
        gate: the decay: a name in ``lba_exp.registry.GATES``.
        gate_init: ``"timescales"`` or ``"random"``, see ``lba_exp.nn.gates``.
        convention: which token's gate decays a step: ``"key"``, ``"query"`` or ``"symmetric"`` (all agree for a fixed gate).
        scale: ``"after"`` divides each row by the sum of its masked scores; ``"none"`` divides the queries by the root of the
            features per head instead.
        form: the form to compute in: one of ``forms``, or ``"auto"``.
        chunk_size: tokens per chunk of the chunkwise form.

    Raises:
        ValueError: for a size or a name that is not valid.
        lba_exp.errors.ConfigError: for an unknown feature map or gate.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        feature_map: str = "silu_normalised",
        gate: str = "selective",
        gate_init: str = "timescales",
        convention: str = "key",
        scale: str = "after",
        form: str = "parallel",
        chunk_size: int = 64,
    ):
        super().__init__()
        check_heads(width, heads)
        check_positive(chunk_size=chunk_size)
        choice("convention", convention, ops.CONVENTIONS)
        choice("scale", scale, SCALES)
        self.heads = heads
        self.head_width = width // heads
        self.feature_map_name = feature_map
        self.feature_map = FEATURE_MAPS[feature_map]
        self.convention = convention
        self.scaled = scale == "after"
        self.chunk_size = chunk_size
        self.form = form
        self.qkv = nn.Linear(width, 3 * width)
        self.gate = GATES[gate](width, heads, gate_init)
        self.output = nn.Linear(width, width)

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms in which the layer computes the same outputs."""
        return tuple(ops.MODEL_FORMS)

    @property
    def form(self) -> str:
        return self._form

    @form.setter
    def form(self, form: str) -> None:
        choice("form", form, (*self.forms, "auto"))
        self._form = form

    @property
    def state_size(self) -> int:
        """Numbers that the recurrent form holds per sequence: S of both directions, and z of both where the output is scaled."""
        return 2 * self.heads * self.head_width * (self.head_width + self.scaled)

    def operands(self, x: Tensor, padding_mask: Tensor | None = None) -> dict:
        """The keyword arguments of ``lba_exp.ops.bidirectional_linear_attention``, all but ``form``.

        Args:
            x: (B, L, width).
            padding_mask: (B, L) bool, True at real tokens; or None.

        Returns:
            q, k, v of one dtype (that of autocast, where it is on), the decays in float32 (float64 for a float64 model), and settings.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_width)).unbind(2)
        # autocast runs some feature maps in float32
        q, k = self.feature_map(q).to(v.dtype), self.feature_map(k).to(v.dtype)
        if not self.scaled:
            q = q * self.head_width**-0.5
        forward_log_decay, backward_log_decay = ops.step_log_decays(self.gate(x), convention=self.convention)
        return {
            "q": q,
            "k": k,
            "v": v,
            "forward_log_decay": forward_log_decay,
            "backward_log_decay": backward_log_decay,
            "scaled": self.scaled,
            "padding_mask": padding_mask,
            "chunk_size": self.chunk_size,
        }

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width). What stands at padded positions does not matter to the others, at either end."""
        y = ops.bidirectional_linear_attention(**self.operands(x, padding_mask), form=self.form)
        return self.output(y.flatten(2))

    def extra_repr(self) -> str:
        scale = "after" if self.scaled else "none"
        return f"heads={self.heads}, feature_map={self.feature_map_name}, convention={self.convention}, scale={scale}, form={self.form}"
