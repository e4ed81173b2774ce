"""RWKV-6 ("Finch") time mixing, bidirectional: a token reads the states beside it, and itself with a weight of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp import ops
from lba_exp.nn.checks import check_heads, check_padding_mask, check_positive
from lba_exp.nn.gates import VectorGate, linear_at_least_float32
from lba_exp.nn.head_norms import HeadNorm
from lba_exp.nn.mixer import OperatorMixer
from lba_exp.nn.scans import direction_of_layer

SMALLEST_LOG_DECAY = -1e4  # exp of it is 0 in every dtype
ADAPTER_RANGE = 1e-4  # low-rank weights start uniform within it, as published
PLACE = 0.5  # r_0 and r_1 of the published initialisation, the layer's place in the network: here that of its middle


def previous(x: Tensor) -> Tensor:
    """Each token's predecessor, 0 before the first: (B, L, ...) -> (B, L, ...)."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def following(x: Tensor) -> Tensor:
    """Each token's successor, 0 after the last: (B, L, ...) -> (B, L, ...)."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


class TokenShift(nn.Module):
    """Mixtures of each token with the one beside it, that depend on both (arXiv 2404.05892, equations 14 and 15)::

        mixed_n = x + (x' - x) (mu_n + tanh(z A_n) B_n),    z = x + (x' - x) mu_x

    x' is the token before, for direction "forward"; the token after, for "backward"; and for "both" the one before in the first half of the
    channels, the one after in the second half: that is ours, as Vision-RWKV (arXiv 2403.02308) shifts channels to all sides of a patch.

    Args:
        width: features per token.
        mixtures: a letter each: "r" and "g" start nearer to the token itself, and "v", too; others alike.
        rank: of A_n B_n.
        direction: ``"both"``, ``"forward"`` or ``"backward"``.
    """

    weight_decay_exempt = True

    def __init__(self, width: int, mixtures: str, rank: int, direction: str):
        super().__init__()
        self.direction, self.before = direction, {"forward": width, "backward": 0, "both": width // 2}[direction]
        ramp = torch.cat([torch.arange(n) / max(1, n) for n in (self.before, width - self.before)])  # i / D, of either side's channels
        plain = 1 - ramp**PLACE
        start = {"r": 1 - ramp ** (PLACE / 2), "g": 1 - ramp ** (PLACE / 2), "v": plain - 0.3 * PLACE}
        self.input_mix = nn.Parameter(plain.clone())
        self.mix = nn.Parameter(torch.stack([start.get(name, plain) for name in mixtures]))
        self.down = nn.Linear(width, len(mixtures) * rank, bias=False)
        self.up = nn.Parameter(torch.empty(len(mixtures), rank, width))
        for weight in (self.down.weight, self.up):
            nn.init.uniform_(weight, -ADAPTER_RANGE, ADAPTER_RANGE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (mixtures, B, L, width)."""
        beside = torch.cat([previous(x[..., : self.before]), following(x[..., self.before :])], dim=-1)
        change = beside - x
        hidden = torch.tanh(self.down(x + change * self.input_mix)).unflatten(-1, (len(self.mix), -1))
        offsets = torch.einsum("blnr,nrw->nblw", hidden, self.up)
        return x + change * (self.mix[:, None, None] + offsets)


class DecayGate(VectorGate):
    """lambda = exp(-exp(d)), d = d_0 + tanh(x W_a) W_b, one number per token and key channel (arXiv 2404.05892, equations 14, 17, 18).

    Returns log lambda = -exp(d), (B, L, heads, Dk), in at least float32. d is held below log(1e4), where lambda is 0 in every dtype and has
    no gradient any more; however small d becomes, lambda tends to 1. d_0 starts at the memory lengths of ``"timescales"``, 4 to 256 tokens
    over the channels of each head, W_a and W_b near 0. (Published: 3 to 400 tokens over the channels of all heads.)
    """

    initialisations = ("timescales",)

    def __init__(self, width: int, heads: int, rank: int):
        super().__init__(width, heads)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width)
        for weight in (self.down.weight, self.up.weight):
            nn.init.uniform_(weight, -ADAPTER_RANGE, ADAPTER_RANGE)
        with torch.no_grad():
            self.up.bias.copy_(F.softplus(-self.start_logits("timescales", None).double()).log().flatten())

    def forward(self, x: Tensor) -> Tensor:
        d = linear_at_least_float32(torch.tanh(linear_at_least_float32(x, self.down)), self.up)
        return -torch.exp(d.clamp_max(math.log(-SMALLEST_LOG_DECAY))).unflatten(-1, (self.heads, self.key_width))


class RWKV6(OperatorMixer):
    """Time mixing of RWKV-6 (arXiv 2404.05892, equations 14 to 22) in both directions::

        S_i = diag(w_i) S_{i-1} + k_i v_i^T,    the same from the end,    y_i = r_i^T (S^F_{i-1} + diag(u) k_i v_i^T + S^B_{i+1})

    r, k, v, the output gate g and the decays w come from mixtures of a token with one beside it (``TokenShift``, ``DecayGate``). Then norm
    of each head, times SiLU(g), and the output projection. No projection has a bias, as published. The weight u of the token itself stands
    for the 1 of other mixers, once: no convention and no weight of the diagonal says that. So the operator is called once a direction, with
    the query of token i in the place of the neighbour whose state it is to read, and what it reads is moved back.

    r is divided by sqrt(Dk): with the norm's eps of 1e-5 that is the published eps of 64e-5 for heads of 64. Mixtures and u start as in the
    middle of the published network (appendix I), since a layer here does not know its place; projections start as ``nn.Linear``'s do.

    Args:
        width: features per token, in and out.
        heads: heads; divides width. Keys and values of a head have width / heads features each.
        direction: ``"both"``, ``"forward"``, ``"backward"``, or ``"alternating"`` (by ``layer``: even ones forward, odd ones backward).
        form: ``"parallel"``, ``"recurrent"``, ``"chunkwise"`` or ``"auto"``.
        chunk_size: tokens per chunk of the chunkwise form.
        shift_rank, decay_rank: features of the low-rank adapters of mixtures and decays, at most the width (published: 32 and 64; twice
            that for a width of 4,096).
        norm_eps: added to the norm's variance.
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
        shift_rank: int = 32,
        decay_rank: int = 64,
        norm_eps: float = 1e-5,
        layer: int = 0,
    ):
        super().__init__()
        check_heads(width, heads)
        check_positive(chunk_size=chunk_size, shift_rank=shift_rank, decay_rank=decay_rank)
        self.heads, self.chunk_size = heads, chunk_size
        self.key_width = self.value_width = width // heads
        self.direction = direction_of_layer(direction, layer)
        self.shift = TokenShift(width, "rkvgd", min(shift_rank, width), self.direction)
        self.receptance, self.key, self.value, self.output_gate = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate = DecayGate(width, heads, min(decay_rank, width))
        channel = torch.arange(width)
        # 1-D: it gets no weight decay
        self.bonus = nn.Parameter(PLACE * (1 - channel / max(1, width - 1)) + 0.1 * ((channel + 1) % 3))
        self.norm = HeadNorm(heads, width, eps=norm_eps)
        self.output = nn.Linear(width, width, bias=False)
        self.form = form

    def operands(self, x: Tensor, padding_mask: Tensor | None = None) -> list[dict]:
        """The keyword arguments of each call of ``lba_exp.ops.bidirectional_linear_attention``, one a direction, all but ``form``.

        Args:
            x: (B, L, width).
            padding_mask: (B, L) bool, True at real tokens; or None.

        Returns:
            q (moved by one token), k, v of one dtype (that of autocast, where it is on), the decays in float32 (float64 for a float64
            model), and settings. k and q of padded tokens are 0: as a query lies in another token's place, no mask goes to the operator.
        """
        r, k, v, _, log_decay = self._project(x, padding_mask)
        return self._calls(r, k, v, log_decay)

    def _project(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """r / sqrt(Dk), k, v of (B, L, heads, Dk), g of (B, L, width), log w of (B, L, heads, Dk)."""
        check_padding_mask(padding_mask, *x.shape[:2])
        padded = None if padding_mask is None else ~padding_mask[:, :, None]
        if padded is not None:
            x = x.masked_fill(padded, 0)  # neighbours look at them
        *mixed, for_decay = self.shift(x)
        r, k, v, g = (f(y) for f, y in zip((self.receptance, self.key, self.value, self.output_gate), mixed, strict=True))
        if padded is not None:
            r, k = r.masked_fill(padded, 0), k.masked_fill(padded, 0)
        r, k, v = (y.unflatten(-1, (self.heads, self.key_width)) for y in (r, k, v))
        return r * self.key_width**-0.5, k, v, g, self.gate(for_decay)

    def _calls(self, r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> list[dict]:
        decays = dict(zip(("forward", "backward"), ops.step_log_decays(log_decay, "query"), strict=True))
        moves = {"forward": following, "backward": previous}  # where the query of token i lies: at i - 1, at i + 1
        return [
            {
                "q": moves[direction](r),
                "k": k,
                "v": v,
                "forward_log_decay": decays["forward"] if direction == "forward" else None,
                "backward_log_decay": decays["backward"] if direction == "backward" else None,
                "scaled": False,
                "direction": direction,
                "chunk_size": self.chunk_size,
            }
            for direction in self.directions
        ]

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width). What stands at padded positions does not matter to the others, at either end."""
        r, k, v, g, log_decay = self._project(x, padding_mask)
        bonus = self.bonus.unflatten(0, (self.heads, self.key_width))
        y = (r * bonus * k).sum(-1, keepdim=True) * v
        for call in self._calls(r, k, v, log_decay):
            back = previous if call["direction"] == "forward" else following
            y = y + back(self.operator(**call, form=self.form))
        return self.output(self.norm(y.to(v.dtype).flatten(2)) * F.silu(g))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, direction={self.direction}, form={self.form}"
