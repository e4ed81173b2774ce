"""One layer for every linear mixer, put together from named parts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp import ops
from lba_exp.nn import hippo
from lba_exp.nn.checks import check_heads, check_positive
from lba_exp.nn.conflicts import DT_MAX, DT_MIN, HIPPO, linear_conflict
from lba_exp.nn.head_norms import make_head_norm
from lba_exp.nn.mixer import OperatorMixer
from lba_exp.nn.scans import SCANS, direction_of_layer, scan_order
from lba_exp.nn.sequence_ranks import SequenceRanks
from lba_exp.ops.checks import choice, unchecked_decays
from lba_exp.ops.order import inverse_of, reorder
from lba_exp.registry import FEATURE_MAPS, GATES

SCALES = ("after", "before", "none")
OUTPUT_GATES = {"none": None, "silu": F.silu, "sigmoid": torch.sigmoid}
EPS = 1e-6  # added to denominators


def row_sums(
    q: Tensor, k: Tensor, direction: str, padding_mask: Tensor | None, ranks: SequenceRanks | None = None, order: Tensor | None = None
) -> Tensor:
    """Sums of undecayed scores, sum_j q_i . k_j over the tokens that the direction reads: (B, L, H), at least float32, in linear time.

    ``order``: the tokens as they are read, where not as they are stored; not beside ``ranks``.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.to(dtype)
    if padding_mask is not None:
        k = k.masked_fill(~padding_mask[:, :, None, None], 0)
    whole = k.sum(1, keepdim=True)
    if direction != "both" and order is not None:
        inverse = inverse_of(order)
        k = reorder(k, order, inverse)
    if direction == "both":
        total = whole if ranks is None else ranks.sum(whole)
    elif direction == "forward":
        total = k.cumsum(1) + (0 if ranks is None else ranks.before(whole))
    else:
        total = k.flip(1).cumsum(1).flip(1) + (0 if ranks is None else ranks.after(whole))
    if direction != "both" and order is not None:
        total = reorder(total, inverse, order)
    return (q.to(dtype) * total).sum(-1)


class LinearAttention(OperatorMixer):
    """Bidirectional linear attention: Y = Scale(phi(Q) phi(K)^T (.) M) V, then an output projection (arXiv 2502.16249, section 3).

    The mask M holds the products of the decays between two tokens. The form in which that is computed (parallel, recurrent, chunkwise,
    fused) is a switch, ``layer.form = "recurrent"``: same weights, same outputs. So is ``layer.sequence_ranks``: with the ranks of a
    process group the layer's tokens are this rank's block of the sequence, and its outputs those of the whole sequence.

    Args:
        width: features per token, in and out.
        heads: heads; divides width. Keys and values of a head have width / heads features each.
        feature_map: phi, on queries and keys: a name in ``lba_exp.registry.FEATURE_MAPS``.
        gate: the decay: a name in ``lba_exp.registry.GATES``.
        gate_init: how decays start: ``"timescales"``, ``"random"``, ``"retnet"``, ``"hippo"`` or ``"hippo_lin"``, see
            ``lba_exp.nn.gates``. The last two also set W_q, W_k and W_v, see ``lba_exp.nn.hippo``.
        gate_trained: False: the decays stay as they start.
        dt_min, dt_max: range of the step sizes of the HiPPO initialisations.
        convention: which token's gate decays a step: ``"key"``, ``"query"`` or ``"symmetric"`` (all agree for a fixed gate).
        complement_keys: multiply keys by 1 - lambda (Gated RFA, arXiv 2103.02143, section 3.2).
        open_first: the first token's gate is 1 (the class token's in the paper's released vision code).
        scale: ``"after"`` divides each row by the sum of its masked scores; ``"before"`` by the sum of its scores before the decays act
            (the same tokens, all weighed 1); ``"none"`` divides the queries by the root of the features per head instead.
        norm: after attention: ``"none"``, ``"layer"`` or ``"rms"`` over all heads, ``"group"`` for each head by itself.
        norm_eps: added to that norm's variance.
        output_gate: ``"silu"`` (RetNet, arXiv 2307.08621, equation 8; GLA, arXiv 2312.06635) or ``"sigmoid"``: what comes out of that norm
            is multiplied by SiLU(W x + b), or by sigmoid(W x + b); ``"none"``.
        direction: ``"both"``, ``"forward"``, ``"backward"``, or ``"alternating"`` (by ``layer``: even ones forward, odd ones backward).
        diagonal: ``"once"``, or ``"twice"``, the plain sum of two directions, which counts each token's own score twice.
        scan: order in which a grid is read: ``"raster"`` (as it comes), ``"snake"`` (every other row backwards), or ``"multi"``: the snake
            and the snake over columns, each with a gate of its own; numerators and denominators are averaged before the division.
        form: the form to compute in: one of ``forms``, ``"fused"`` (on a GPU, one decay per head), or ``"auto"``.
        chunk_size: tokens per chunk of the chunkwise form.
        layer: index of the layer, for ``direction="alternating"``.
        grid: (height, width) of the tokens, stored row by row; needed for, and used by, scans other than raster alone.
        class_token: a token before those of the grid, which stays first in every scan.

    Raises:
        ValueError: for a value that is not valid, or for two that do not fit together.
        lba_exp.errors.ConfigError: for an unknown feature map or gate.
    """

    sequence_ranks: SequenceRanks | None = None

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        feature_map: str = "silu_normalised",
        gate: str = "selective",
        gate_init: str = "timescales",
        gate_trained: bool = True,
        dt_min: float = DT_MIN,
        dt_max: float = DT_MAX,
        convention: str = "key",
        complement_keys: bool = False,
        open_first: bool = False,
        scale: str = "after",
        norm: str = "none",
        norm_eps: float = 1e-5,
        output_gate: str = "none",
        direction: str = "both",
        diagonal: str = "once",
        scan: str = "raster",
        form: str = "parallel",
        chunk_size: int = 64,
        layer: int = 0,
        grid: tuple[int, int] | None = None,
        class_token: bool = False,
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_heads(width, heads)
        check_positive(chunk_size=chunk_size)
        choice("convention", convention, ops.CONVENTIONS)
        choice("scale", scale, SCALES)
        choice("output_gate", output_gate, tuple(OUTPUT_GATES))
        choice("diagonal", diagonal, ("once", "twice"))
        choice("scan", scan, tuple(SCANS))
        if not 0 < dt_min < float("inf"):
            raise ValueError(f"dt_min: expected a number above 0, got {dt_min}")
        if conflict := linear_conflict(settings):
            raise ValueError(conflict)
        self.heads, self.head_width = heads, width // heads
        self.key_width = self.value_width = self.head_width
        self.feature_map_name, self.feature_map = feature_map, FEATURE_MAPS[feature_map]
        self.gate_name, self.convention, self.complement_keys, self.open_first = gate, convention, complement_keys, open_first
        self.scale = scale
        self.direction = direction_of_layer(direction, layer)
        self.diagonal_weight = 2.0 if diagonal == "twice" else 1.0
        self.scan, self.grid, self.class_token = scan, None if grid is None else tuple(grid), class_token
        self.chunk_size = chunk_size
        self.qkv = nn.Linear(width, 3 * width)
        start = {}
        if gate_init in HIPPO:
            rates = hippo.rates(gate_init, heads, self.head_width)
            steps = hippo.draw_steps(heads, self.head_width, dt_min, dt_max)
            hippo.initialise_projections(self.qkv, hippo.zero_order_hold(rates, steps))
            start = {"log_decay": steps * rates}
        self.gate = GATES[gate](width, heads, gate_init, **start)
        self.per_channel, self.expanding = self.gate.per_channel, self.gate.expanding
        self.gate2 = GATES[gate](width, heads, gate_init, **start) if scan == "multi" else None
        if not gate_trained:  # and what a plugin's gate has frozen stays frozen
            for frozen in self._gates:
                frozen.requires_grad_(False)
        self.norm = make_head_norm(norm, width, heads, norm_eps)
        self.output_gate_name, self.output_activation = output_gate, OUTPUT_GATES[output_gate]
        self.output_gate = None if output_gate == "none" else nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.form = form
        if scan != "raster":
            self._set_orders()

    @property
    def _gates(self) -> list[nn.Module]:
        return [self.gate] if self.gate2 is None else [self.gate, self.gate2]

    def _set_orders(self) -> None:
        if self.grid is None:
            raise ValueError(f"grid: expected (height, width), which scan={self.scan!r} needs, got None")
        check_positive(**{"grid height": self.grid[0], "grid width": self.grid[1]})
        orders = torch.stack([scan_order(name, self.grid, self.class_token) for name in SCANS[self.scan]])
        # a function of the settings: not a part of the weights
        self.register_buffer("orders", orders, persistent=False)
        self.register_buffer("places", torch.stack([inverse_of(order) for order in orders]), persistent=False)

    @property
    def sequence_conflict(self) -> str | None:
        """Why the tokens cannot lie on several ranks; None where they can."""
        return None if self.scan == "raster" else f"scan={self.scan!r} reads the tokens in another order than they are stored in"

    @property
    def scaled(self) -> bool:
        """Whether the operator divides."""
        return self.scale == "after"

    @property
    def state_size(self) -> int:
        """Numbers that the recurrent form holds per sequence: S of every direction and scan, and z of each where the output is scaled."""
        scans = len(SCANS[self.scan]) * len(self.directions)
        return scans * self.heads * self.head_width * (self.head_width + (self.scale != "none"))

    def _values_unchecked(self) -> AbstractContextManager:
        # under compile the operator checks no values
        return unchecked_decays() if self.expanding and not torch.compiler.is_compiling() else nullcontext()

    def operands(self, x: Tensor, padding_mask: Tensor | None = None) -> dict | list[dict]:
        """The keyword arguments of ``lba_exp.ops.bidirectional_linear_attention``, all but ``form``; for two scans a list of two such.

        Args:
            x: (B, L, width).
            padding_mask: (B, L) bool, True at real tokens; or None.

        Returns:
            q, k, v of one dtype (that of autocast, where it is on), the decays in float32 (float64 for a float64 model), and settings, in
            the order in which the tokens are read, ``token_order``; all else as they are stored.

        Raises:
            ValueError: for a length that is not that of the grid, where there is one to read.
        """
        calls = self._calls(x, padding_mask)
        return calls[0] if len(calls) == 1 else calls

    def _calls(self, x: Tensor, padding_mask: Tensor | None) -> list[dict]:
        if self.scan != "raster" and x.shape[1] != self.orders.shape[1]:
            token = " and a class token" if self.class_token else ""
            expected = f"{self.orders.shape[1]} tokens, a grid of {self.grid[0]} x {self.grid[1]}{token}"
            raise ValueError(f"length: expected {expected}, for scan={self.scan!r}, got {x.shape[1]}")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_width)).unbind(2)
        # autocast runs some feature maps in float32
        q, k = self.feature_map(q).to(v.dtype), self.feature_map(k).to(v.dtype)
        if self.scale == "none":
            q = q * self.head_width**-0.5
        orders, places = ([None], [None]) if self.scan == "raster" else (self.orders, self.places)
        each = zip(self._gates, orders, places, strict=True)
        return [self._call(q, k, v, gate(x), padding_mask, order, back) for gate, order, back in each]

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_gate: Tensor | None,
        padding_mask: Tensor | None,
        order: Tensor | None,
        places: Tensor | None,
    ) -> dict:
        """One call of the operator, tokens read in an order of their own, undone by ``places``."""
        if self.complement_keys:
            complement = -torch.expm1(log_gate)
            k = (k * (complement if complement.ndim in (2, 4) else complement[..., None])).to(v.dtype)
        if self.scale == "before":
            # Scale acts on rows: to divide the query by the row's sum is to divide the row
            sums = row_sums(q, k, self.direction, padding_mask, self.sequence_ranks, order)
            q = (q / (sums + EPS)[..., None]).to(v.dtype)
        if order is not None and log_gate is not None and log_gate.ndim > 2:
            log_gate = reorder(log_gate, order, places)
        ranks = self.sequence_ranks
        group = None if ranks is None else ranks.group
        if self.open_first and (ranks is None or ranks.first):
            log_gate = torch.cat([torch.zeros_like(log_gate[:, :1]), log_gate[:, 1:]], dim=1)
        with self._values_unchecked():
            forward_log_decay, backward_log_decay = ops.step_log_decays(log_gate, self.convention, sequence_group=group)
        return {
            "q": q,
            "k": k,
            "v": v,
            "forward_log_decay": None if self.direction == "backward" else forward_log_decay,
            "backward_log_decay": None if self.direction == "forward" else backward_log_decay,
            "scaled": self.scaled,
            "diagonal_weight": self.diagonal_weight,
            "direction": self.direction,
            "padding_mask": padding_mask,
            "chunk_size": self.chunk_size,
            "token_order": order,
            "sequence_group": group,
        }

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width). What stands at padded positions does not matter to the others, at either end."""
        with self._values_unchecked():
            y = self._attend(self._calls(x, padding_mask))
        y = self.norm(y.flatten(2))
        if self.output_gate is not None:
            y = y * self.output_activation(self.output_gate(x))
        return self.output(y)

    def _attend(self, calls: list[dict]) -> Tensor:
        """The operator's calls, averaged over scans: (B, L, heads, Dv)."""
        if len(calls) == 1:
            return ops.bidirectional_linear_attention(**calls[0], form=self.form)
        if not self.scaled:
            return sum(ops.bidirectional_linear_attention(**call, form=self.form) for call in calls) / 2
        if not self.complement_keys and self.sequence_ranks is None:  # all read the same keys
            each = {name: [call[name] for call in calls] for name in ("forward_log_decay", "backward_log_decay")}
            decays = {name: None if x[0] is None else torch.stack(x) for name, x in each.items()}
            shared = {name: x for name, x in calls[0].items() if name not in ("scaled", "sequence_group")}
            return ops.bidirectional_linear_attention_scans(**shared | decays | {"token_order": self.orders}, form=self.form, eps=EPS)
        parts = ({name: value for name, value in call.items() if name != "scaled"} for call in calls)
        each = [ops.bidirectional_linear_attention_parts(**part, form=self.form) for part in parts]
        return ops.divided_means(each, calls[0]["padding_mask"], EPS).to(calls[0]["v"].dtype)

    def extra_repr(self) -> str:
        parts = {"heads": self.heads, "feature_map": self.feature_map_name, "gate": self.gate_name, "convention": self.convention}
        parts |= {"scale": self.scale, "output_gate": self.output_gate_name, "direction": self.direction, "scan": self.scan}
        parts |= {"form": self.form}
        return ", ".join(f"{name}={value}" for name, value in parts.items())
