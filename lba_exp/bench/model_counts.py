"""What a model's operators take by formula: floating-point operations, and the memory of a token where no token sees all others at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lba_exp import ops
from lba_exp.callbacks.parity_measure import linear_layers, operator_calls
from lba_exp.nn.softmax import SoftmaxAttention
from lba_exp.ops.precision import compute_dtype

# of one sequence and head; W = Dv + 1 where the output is divided, else Dv; n directions; C tokens a chunk, at most L
FORMULAS = {
    "parallel": "2 L^2 (Dk + Dv)",
    "chunkwise": "2 L C (Dk + W) + 4 n L Dk W",
    "recurrent": "n L Dk W (4, or 5 with decay) + 2 L (Dk + Dv)",
}
DELTA, SCAN, PRODUCTS = "delta rule", "selective scan", "linear attention"


@dataclass(frozen=True)
class Call:
    """One call of the operator on one sequence: sizes, directions, whether it divides, whether it decays; ``kind``: SCAN's kernel goes
    token by token, PRODUCTS's by chunks; DELTA, the delta rule, corrects its state instead, which has other formulas."""

    length: int
    heads: int
    key_width: int
    value_width: int
    directions: int
    divided: bool
    decays: bool
    kind: str = PRODUCTS


@dataclass(frozen=True)
class Counts:
    """Of one sequence: the calls of all layers, and the bytes that a block must hold for a token, see ``read_counts``."""

    calls: tuple[Call, ...]
    token_bytes: float


def operator_flops(calls: Iterable[Call], form: str | None, chunk: int | None) -> int | None:
    """Multiplications and additions of the calls by FORMULAS; None for operators that they are not those of.

    Left out is what is O(L d): feature maps, gates, sums of decays, divisions; and what masks and row sums add to L^2 or L C scores.

    Args:
        form: one of the operator's; "fused" is counted as chunkwise, that of a selective scan as recurrent; None: softmax attention, as
            many products as the parallel form.
        chunk: tokens a chunk.
    """
    total = 0
    for call in calls:
        if call.kind == DELTA:
            return None
        length, keys, values, both = call.length, call.key_width, call.value_width, call.directions
        wide = values + call.divided
        if form in (None, "parallel"):
            one = 2 * length**2 * (keys + values)
        elif form == "recurrent" or (form, call.kind) == ("fused", SCAN):
            one = both * length * keys * wide * (5 if call.decays else 4) + 2 * length * (keys + values)
        else:
            one = 2 * length * min(chunk, length) * (keys + wide) + 4 * both * length * keys * wide
        total += call.heads * one
    return total


def read_counts(model: nn.Module, inputs: Tensor) -> Counts:
    """The operator's calls in a forward pass over ``inputs``, one sequence, and the bytes that a block must hold for each token.

    The latter is the larger of two places, both proportional to the width. At the mixer: the residual stream, its norm, the operator's
    operands (what shares memory once), its numerator and denominator, and the output. In the MLP: the stream, its norm, the hidden layer
    before and after its activation. Not counted are states, scores, further copies that a mixer makes (gates of its output, convolutions,
    other projections), and what the callers still refer to: the inputs of the block and of the first one.
    """
    calls: list[Call] = []
    places = [0.0]
    handles = []

    def linear(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0]
        mask = args[1] if len(args) > 1 else kwargs.get("padding_mask")
        operands, written = operator_calls(layer, x, mask), 0
        for call in operands:
            calls.append(_call(layer, call))
            tensors = [y for y in call.values() if isinstance(y, Tensor) and y.is_floating_point()]
            rows, length, heads, _, values = layer.call_shape(call)
            wide = compute_dtype(*tensors).itemsize
            written = max(written, rows * length * heads * (values * (wide + x.element_size()) + wide * calls[-1].divided))
        places.append((2 * x.nbytes + written + _distinct_bytes(operands, x.shape[1])) / x.shape[:2].numel())

    def softmax(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0]
        width = x.shape[2] // layer.heads
        calls.append(Call(x.shape[1], layer.heads, width, width, 1 if layer.direction != "both" else 2, True, False))

    def mlp(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0]
        hidden = max((m.out_features for m in layer.modules() if isinstance(m, nn.Linear)), default=0)
        places.append((2 * x.shape[-1] + 2 * hidden) * x.element_size())

    for layer in linear_layers(model):
        handles.append(layer.register_forward_pre_hook(linear, with_kwargs=True))
    for module in model.modules():
        if isinstance(module, SoftmaxAttention):
            handles.append(module.register_forward_pre_hook(softmax, with_kwargs=True))
        if isinstance(getattr(module, "mlp", None), nn.Module):
            handles.append(module.mlp.register_forward_pre_hook(mlp, with_kwargs=True))
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Counts(tuple(calls), max(places))


def _call(layer: nn.Module, operands: dict) -> Call:
    rows, length, heads, keys, values = layer.call_shape(operands)
    directions = 2 if operands["direction"] == "both" else 1
    decays = any(x is not None for x in layer.call_decays(operands).values())
    operator = getattr(layer, "operator", ops.bidirectional_linear_attention)
    # divided by the operator, or by a layer that asks for the denominator (mLSTM)
    divided = operator is ops.bidirectional_linear_attention and operands.get("scaled", True)
    kind = {ops.bidirectional_linear_attention: PRODUCTS, ops.selective_scan: SCAN}.get(operator, DELTA)
    return Call(length, rows * heads, keys, values, directions, divided, decays, kind)


def _distinct_bytes(operands: list[dict], length: int) -> int:
    """Bytes of what has a value for each token, views of one memory counted once."""
    found = {}
    for x in tree_leaves(operands):
        if isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == length:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(found.values())
