"""Blocks whose tokens come in chunks: the model's own blocks, with the operator's calls answered from states that are carried along."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lba_exp import ops
from lba_exp.inference.tapes import FileTape, Tape
from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.blocks import Block
from lba_exp.nn.hgrn2 import HGRN2
from lba_exp.nn.hydra import Hydra
from lba_exp.nn.mamba2 import Mamba2
from lba_exp.nn.mlstm import MLSTM
from lba_exp.nn.norms import normalise
from lba_exp.nn.rwkv6 import RWKV6

EPS = inspect.signature(ops.bidirectional_linear_attention).parameters["eps"].default

Read = Callable[[int, int], Tensor]  # (start, stop) -> (1, stop - start, width)
MakeTape = Callable[[int, int, torch.dtype], Tape | FileTape]


def context(mixer: nn.Module) -> tuple[int, int] | None:
    """Tokens before and after a chunk that a mixer has to see so that all it makes of the chunk's own tokens is right; None: not known.

    The gates at the cut come from the neighbours, convolutions and token shifts reach further, and the first token of all may be treated
    apart. A plugin's mixer says it itself, as ``stream_context``.
    """
    after = 0 if getattr(mixer, "direction", "both") == "forward" else 1
    kind = type(mixer)
    if kind in (LinearAttention, HGRN2):
        return 2, after
    if kind in (Mamba2, Hydra):
        left, right = mixer.convolution.margins
        return max(left, 1), max(right, after)
    if kind is RWKV6:  # queries lie one token away, and are mixtures of two tokens
        return 2, 1 + after
    return getattr(mixer, "stream_context", None)


def obstacle(block: nn.Module) -> str | None:
    """Why a block cannot be run chunk by chunk with a state of fixed size; None where it can."""
    mixer = getattr(block, "mixer", None)
    if type(block) is not Block:
        return f"{type(block).__name__} is no block of this package"
    if reason := getattr(mixer, "sequence_conflict", None):
        return reason
    if isinstance(mixer, MLSTM):
        return "its keys are scaled by the largest input gate of the whole sequence"
    if getattr(mixer, "expanding", False):
        return "its decays may exceed 1, which the parallel form alone can run"
    if isinstance(mixer, LinearAttention) and mixer.scale == "before":
        return "scale='before' divides queries by sums over the whole sequence"
    operator = getattr(mixer, "operator", None)
    if operator is not ops.bidirectional_linear_attention:
        return f"its operator, {getattr(operator, '__name__', None) or 'unknown'}, has no form that takes tokens chunk by chunk"
    if context(mixer) is None:
        return f"{type(mixer).__name__} does not say how many neighbours a token's operands depend on (stream_context)"
    return None


class StreamedBlock:
    """One block of a model, run over one sequence in chunks: first from the end, for the backward states, then from the beginning.

    The block itself stays as it is: what runs is a second view of its weights, whose mixer gets the operator's outputs from
    ``lba_exp.ops.stream``. The operands of a chunk are the mixer's own, of the chunk and a few neighbours (``context``), which are then cut
    off. Outputs of the backward direction wait on a tape, (L, heads * (Dv + 1)).

    Args:
        block: one without ``obstacle``.
    """

    def __init__(self, block: Block):
        self.block = copy.copy(block)
        self.block._modules = dict(block._modules)  # the copy is to have a mixer of its own
        self.block.mixer = self.mixer = copy.copy(block.mixer)
        if isinstance(self.mixer, LinearAttention):
            self.mixer._attend = lambda calls: self._answer(**calls[0])
        else:
            self.mixer.operator = self._answer
        self.left, self.right = context(self.mixer)
        self._states: dict[tuple[int, str], Tensor] = {}
        self._calls = 0  # that were answered in this forward pass
        self._before: dict[int, Tensor] = {}  # outputs of the forward direction at the last tokens, by call
        self._parts: Tensor | None = None  # of the backward direction, of this window
        self._own = slice(0, 0)  # of a window

    @property
    def one_pass(self) -> bool:
        """Whether a token's output depends on no later one."""
        return self.mixer.direction == "forward" and self.right == 0

    def sweep(self, read: Read, length: int, chunk: int, make_tape: MakeTape, done: Callable[[], None]) -> Iterator[tuple[int, Tensor]]:
        """(start, outputs (1, n, width)) of the chunks, from the first to the last.

        Args:
            read: gives the block's inputs; those before the chunk that is being asked for are not asked for any more once it was given.
            length: tokens in all.
            chunk: tokens at a time.
            make_tape: makes what keeps the backward direction's outputs.
            done: called after each chunk of each pass.
        """
        bounds = [(start, min(start + chunk, length)) for start in range(0, length, chunk)]
        tape = None
        if self.mixer.direction != "forward":
            for start, stop in reversed(bounds):
                first, last = max(0, start - self.left), min(length, stop + self.right)
                rows = self._backward(read(first, last), slice(start - first, stop - first))
                tape = tape or make_tape(length, rows.shape[1], rows.dtype)
                tape.write(start, rows)
                done()
        for start, stop in bounds:
            last = min(length, stop + self.right)
            before = start - max(0, start - self.left)
            parts = None if tape is None else tape.read(start - before, last)
            yield start, self.step(read(start, last), stop - start, parts)
            done()

    def step(self, x: Tensor, count: int, parts: Tensor | None = None) -> Tensor:
        """The outputs (1, count, width) of the next tokens, in order.

        Args:
            x: (1, count + some neighbours behind, width).
            parts: (tokens, ...) what the backward direction gave for all of these and for the neighbours before them.
        """
        before = self._before.get(-1, x[:, :0])
        window = torch.cat([before, x], dim=1)
        self._own, self._parts, self._calls = slice(before.shape[1], before.shape[1] + count), parts, 0
        self._before[-1] = window[:, max(0, self._own.stop - self.left) : self._own.stop]
        return self.block(window)[:, self._own]

    def _backward(self, x: Tensor, own: slice) -> Tensor:
        """Takes a window's own tokens into the backward states: what these give, (tokens, heads * (Dv + 1) of each call)."""
        if self.block.pre:
            x = normalise(self.block.mixer_norm, x, None)
        calls = self.mixer.operands(x)
        rows = []
        for index, call in enumerate([calls] if isinstance(calls, dict) else calls):
            if call["direction"] != "forward":
                num, den = self._stream(index, call, own, "backward")
                rows += [num[0].flatten(1), den[0]]
        return torch.cat(rows, dim=1)

    def _stream(self, index: int, call: dict[str, Any], own: slice, direction: str) -> tuple[Tensor, Tensor]:
        """Numerator (1, n, heads, Dv) and denominator (1, n, heads) of one direction of one call, at a window's own tokens."""
        q, k, v = (call[name][:, own] for name in ("q", "k", "v"))
        decay = call.get(f"{direction}_log_decay")
        if decay is not None and decay.ndim > 2:
            decay = decay[:, own]
        state = self._states.get((index, direction))
        if state is None:
            widest = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.promote_types(v.dtype, torch.float32))
            state = ops.start_state(1, q.shape[2], q.shape[3], v.shape[3], widest, q.device)
        share = call.get("diagonal_weight", 1.0) / (2 if call["direction"] == "both" else 1)
        num, den, self._states[index, direction] = ops.stream(state, q, k, v, decay, direction=direction, diagonal_weight=share)
        return num, den

    def _answer(self, **call: Any) -> Tensor:
        """In place of the operator: its outputs at all tokens of the window that later steps of the mixer may read."""
        index, own, v = self._calls, self._own, call["v"]
        self._calls += 1
        heads, width = v.shape[2:]
        total = v.new_zeros(*v.shape[:3], width + 1, dtype=torch.promote_types(v.dtype, torch.float32))
        if call["direction"] != "forward":
            size = heads * (width + 1)
            rows, self._parts = self._parts[:, :size].to(v.device), self._parts[:, size:]
            total = total.to(rows.dtype)
            total[0, ..., :width] = rows[:, : heads * width].unflatten(1, (heads, width))
            total[0, ..., width] = rows[:, heads * width :]
        if call["direction"] != "backward":
            num, den = self._stream(index, call, own, "forward")
            new = torch.cat([num, den[..., None]], dim=-1)
            known = torch.cat([self._before.get(index, new[:, :0]), new], dim=1)
            total = total.to(new.dtype)
            total[:, : known.shape[1]] += known
            self._before[index] = known[:, max(0, known.shape[1] - self.left) :]
        y = total[..., :width]
        if call.get("scaled", True):
            y = ops.divided_means([(y, total[..., width])], None, call.get("eps", EPS))
        return y.to(v.dtype)


def stages(blocks: Sequence[Block]) -> list[list[StreamedBlock]]:
    """The blocks in the groups that are run together: consecutive ones that need one pass, and each of the others by itself."""
    groups: list[list[StreamedBlock]] = []
    for streamed in map(StreamedBlock, blocks):
        if groups and streamed.one_pass and groups[-1][-1].one_pass:
            groups[-1].append(streamed)
        else:
            groups.append([streamed])
    return groups


def passes(blocks: Sequence[Block]) -> int:
    """How often all chunks are gone through."""
    return sum(1 if stage[0].mixer.direction == "forward" else 2 for stage in stages(blocks))


def outputs(
    blocks: Sequence[Block], read: Read, length: int, chunk: int, make_tape: MakeTape, done: Callable[[], None]
) -> Iterator[tuple[int, Tensor]]:
    """(start, (1, n, width)) of the last block's outputs, chunk by chunk from the beginning.

    Activations between two groups of blocks lie on one tape, (L, width): a block's outputs take the place of its inputs as it goes.
    Arguments as of ``StreamedBlock.sweep``; ``read`` gives the first block's inputs.
    """
    tape = None
    groups = stages(blocks)
    for number, group in enumerate(groups, 1):
        found = group[0].sweep(read, length, chunk, make_tape, done)
        for further in group[1:]:
            found = _through(further, found)
        if number == len(groups):
            yield from found
            return
        for start, x in found:
            tape = tape or make_tape(length, x.shape[2], x.dtype)
            tape.write(start, x[0])
        device, kept = x.device, tape
        read = lambda start, stop: kept.read(start, stop)[None].to(device)  # noqa: B023, E731 (called within this round)


def _through(block: StreamedBlock, chunks: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    for start, x in chunks:
        yield start, block.step(x, x.shape[1])
