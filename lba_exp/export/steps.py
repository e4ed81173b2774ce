"""The recurrence as graphs of their own: state and a block of tokens in, state and outputs out.

A model that reads forward alone and has an output for each token (a causal language model) becomes one graph. Of any other no graph can
take one token after the other through all layers: a layer of both directions needs the last token before it gives the first output. There
each layer's operator becomes a graph for each direction: ``(state, q, k, v, log_decay) -> (state, numerator, denominator)``, what
``lba_exp.ops.stream`` does. Operators have no weights, so that layers which are alike share a graph.

program = torch.export.load("step.pt2").module()      # with the parts of the state that read_metadata names, all of them 0 at first
logits, state = program(tokens, state)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lba_exp import ops
from lba_exp.errors import UserError
from lba_exp.models.language import CausalLM, MaskedLM
from lba_exp.nn.attention import EPS, LinearAttention
from lba_exp.nn.embeddings import PositionalEmbedding
from lba_exp.nn.hgrn2 import HGRN2
from lba_exp.nn.mixer import OperatorMixer

SEAMS = {LinearAttention: "_attend", HGRN2: "operator"}  # where a mixer calls its operator


def steps_as_one(model: nn.Module) -> bool:
    """Whether a model becomes one graph: an output for each token, and every layer reads forward."""
    return isinstance(model, CausalLM | MaskedLM) and all(getattr(mixer, "direction", "both") == "forward" for mixer in model.mixers)


def check_steps(model: nn.Module) -> None:
    """Raises UserError for a layer without a recurrent form of the linear operator."""
    for layer, mixer in enumerate(model.mixers):
        linear = isinstance(mixer, OperatorMixer) and mixer.operator is ops.bidirectional_linear_attention
        if not linear or "recurrent" not in mixer.forms:
            raise UserError(f"layer {layer} is {type(mixer).__name__}, which has no step here: only layers of linear attention have one.")


class Carry:
    """The state on its way through one step: each part that keeps something takes it from here and leaves what comes next."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.gate: Tensor | None = None  # of the block's tokens, in the layer that is at work

    def take(self) -> Tensor:
        return self.before[len(self.after)]

    def leave(self, following: Tensor) -> None:
        self.after.append(following)


class StepPositions(nn.Module):
    """A positional embedding that goes on where the last step ended; its state is the number of tokens so far, () int64."""

    def __init__(self, positions: PositionalEmbedding, carry: Carry):
        super().__init__()
        self.weight, self.carry = positions.weight, carry
        self.state = {"name": "position", "dtype": "int64", "shape": []}

    def forward(self, x: Tensor) -> Tensor:
        position, count = self.carry.take(), x.shape[1]
        self.carry.leave(position + count)
        return x + self.weight.index_select(0, position + torch.arange(count, device=x.device))


class StepMixer(nn.Module):
    """A mixer of one direction, forward, that goes on where the last step ended.

    Its state is S beside z, (B, H, Dk, Dv + 1); with the convention "key" and a gate that sees tokens the last token's gate as well.
    """

    def __init__(self, mixer: nn.Module, width: int, layer: int, carry: Carry):
        super().__init__()
        obstacle = None
        if type(mixer) not in SEAMS:
            obstacle = f"{type(mixer).__name__} keeps more than its operator's state"
        elif getattr(mixer, "scale", None) == "before":
            obstacle = "scale='before' divides by sums over all tokens"
        elif getattr(mixer, "open_first", False):
            obstacle = "open_first=True treats the first token of all in its own way"
        if obstacle is not None:
            raise UserError(f"layer {layer} has no exported step in a model of one graph: {obstacle}.")
        self.mixer, self.carry = mixer, carry
        seam = SEAMS[type(mixer)]
        setattr(mixer, seam, self._attend if seam == "_attend" else lambda form, **call: self._attend([call]))
        weight = next(mixer.parameters())
        with torch.no_grad():
            call = mixer.operands(weight.new_zeros(1, 1, width))
        decay = call["forward_log_decay"]
        self.selective = decay is not None and decay.ndim > 2
        self.key_convention = getattr(mixer, "convention", "query") == "key"
        (_, _, heads, width), values = call["q"].shape, call["v"].shape[-1]
        dtype = "float64" if weight.dtype == torch.float64 else "float32"
        self.states = [{"name": f"layer{layer}", "dtype": dtype, "shape": ["batch", heads, width, values + 1]}]
        if self.selective and self.key_convention:
            self.states.append({"name": f"layer{layer}_log_gate", "dtype": dtype, "shape": ["batch", 1, *decay.shape[2:]]})

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        self.carry.gate = self.mixer.gate(x) if self.selective else None
        return self.mixer(x)

    def _attend(self, calls: list[dict[str, Any]]) -> Tensor:
        call, gate = calls[0], self.carry.gate
        state, decay = self.carry.take(), call["forward_log_decay"]
        weight = call.get("diagonal_weight", 1.0)
        # a sequence's first decay never enters; that of a block's first token does
        entering = None
        if self.selective:
            entering = self.carry.before[len(self.carry.after) + 1] if self.key_convention else gate[:, :1]
            decay = torch.cat([entering, decay[:, 1:]], dim=1)
        num, den, following = ops.stream(state, call["q"], call["k"], call["v"], decay, direction="forward", diagonal_weight=weight)
        self.carry.leave(following)
        if self.selective and self.key_convention:
            self.carry.leave(gate[:, -1:])
        return (num / (den + EPS)[..., None] if call["scaled"] else num).to(call["v"].dtype)


class StepModel(nn.Module):
    """``(tokens (B, n), state) -> (logits, state)``: a model's next n tokens. All of the state is 0 before the first.

    Args:
        model: see ``steps_as_one``; it is changed.

    Attributes:
        states: name, dtype and shape of each part of the state.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.carry, self.states = Carry(), []
        if model.encoder.positions is not None:
            model.encoder.positions = StepPositions(model.encoder.positions, self.carry)
            self.states.append(model.encoder.positions.state)
        for layer, block in enumerate(model.blocks):
            block.mixer = StepMixer(block.mixer, width_of(block), layer, self.carry)
            self.states += block.mixer.states
        self.model = model

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.carry.before, self.carry.after = list(state), []
        logits = self.model(tokens)
        after, self.carry.before, self.carry.after, self.carry.gate = tuple(self.carry.after), [], [], None
        return logits, after


class StepOperator(nn.Module):
    """``(state, q, k, v[, log_decay]) -> (state, numerator, denominator)``: n tokens of one direction, see ``lba_exp.ops.stream``."""

    def __init__(self, direction: str, weight: float):
        super().__init__()
        self.direction, self.weight = direction, weight

    def forward(self, state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        num, den, following = ops.stream(state, q, k, v, log_decay, direction=self.direction, diagonal_weight=self.weight)
        return following, num, den


def operators(block: nn.Module, tokens: int) -> list[dict[str, Any]]:
    """How a block's mixer calls its operator, for steps of so many tokens.

    Returns:
        For each call (one for each scan, say) and direction: ``call`` (its number), ``direction``, ``diagonal_weight`` (its share of the
        diagonal), ``divides`` (whether the operator divides by the denominator), and ``inputs`` (name, dtype and shape of each).
    """
    mixer = block.mixer
    weight, grid = next(mixer.parameters()), getattr(mixer, "orders", None)
    with torch.no_grad():
        calls = mixer.operands(weight.new_zeros(1, 2 if grid is None else grid.shape[1], width_of(block)))
    found = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
        directions = ("forward", "backward") if call["direction"] == "both" else (call["direction"],)
        (_, _, heads, keys), values = call["q"].shape, call["v"].shape[-1]
        dtype = "float64" if call["q"].dtype == torch.float64 else "float32"
        for direction in directions:
            shapes = {"state": ["batch", heads, keys, values + 1]}
            shapes |= {name: ["batch", tokens, heads, size] for name, size in (("q", keys), ("k", keys), ("v", values))}
            if (decay := call[f"{direction}_log_decay"]) is not None:
                shapes["log_decay"] = list(decay.shape) if decay.ndim < 3 else ["batch", tokens, *decay.shape[2:]]
            described = {"call": number, "direction": direction, "diagonal_weight": call.get("diagonal_weight", 1.0) / len(directions)}
            described["divides"] = call.get("scaled", True)
            found.append(described | {"inputs": [{"name": name, "dtype": dtype, "shape": shape} for name, shape in shapes.items()]})
    return found


def width_of(block: nn.Module) -> int:
    """Features of a token in a block."""
    return len(block.mixer_norm.weight)
