"""Residual blocks around any mixer, and what a stack of them shares: running, checkpointing, the switch between forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lba_exp import ops
from lba_exp.nn.checks import check_positive
from lba_exp.nn.feedforward import GLU, MLPS, DropPath, gelu_mlp, output_glu
from lba_exp.nn.norms import BatchNorm, make_norm, normalise, recomputation
from lba_exp.nn.sequence_ranks import SequenceRanks, block_bounds
from lba_exp.ops.checks import choice

NORM_POSITIONS = ("pre", "post")
GRAPHS = 64  # that compiled blocks of one model may need: by mode, size of the batch, direction and drop path


class Block(nn.Module):
    """Mixer and MLP, each in a residual branch: (B, L, width) -> (B, L, width).

    Pre-norm: ``x + branch(norm(x))``; post-norm, as in the first Transformer and BERT: ``norm(x + branch(x))``.

    Args:
        mixer: called as ``mixer(x, padding_mask)``, keeps the shape.
        width: features per token.
        mlp: ``"mlp"`` (GELU), ``"glu"`` (the gated GEGLU), or ``"output_glu"``: one branch only, in which a GLU follows the mixer.
        mlp_ratio: hidden width of the MLP over width; above 0.
        dropout: on the residual branches; from 0 to below 1.
        drop_path: probability of leaving a branch out for a sample; from 0 to below 1.
        norm: ``"layer"`` or ``"batch"``.
        norm_position: ``"pre"`` or ``"post"``.
        norm_eps: added to the norms' variance.

    Raises:
        ValueError: for a value that is not valid.
    """

    def __init__(
        self,
        mixer: nn.Module,
        width: int,
        *,
        mlp: str = "mlp",
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm: str = "layer",
        norm_position: str = "pre",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        check_positive(width=width)
        choice("mlp", mlp, MLPS)
        choice("norm_position", norm_position, NORM_POSITIONS)
        if not mlp_ratio > 0:
            raise ValueError(f"mlp_ratio: expected a number above 0, got {mlp_ratio}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number >= 0 and below 1, got {dropout}")
        hidden = max(1, round(width * mlp_ratio))
        self.pre = norm_position == "pre"
        self.mixer_norm = make_norm(norm, width, norm_eps)
        self.mixer = mixer
        if mlp == "output_glu":
            self.after, self.mlp = output_glu(width, dropout), None
        else:
            self.after = nn.Identity()
            self.mlp_norm = make_norm(norm, width, norm_eps)
            self.mlp = gelu_mlp(width, hidden) if mlp == "mlp" else GLU(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        x = self._residual(x, self.mixer_norm, lambda h: self.after(self.mixer(h, padding_mask)), padding_mask)
        return x if self.mlp is None else self._residual(x, self.mlp_norm, self.mlp, padding_mask)

    def _residual(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor], padding_mask: Tensor | None) -> Tensor:
        if self.pre:
            return x + self.drop_path(self.dropout(branch(normalise(norm, x, padding_mask))))
        # autocast's branches are in half precision, the stream is not
        return normalise(norm, x + self.drop_path(self.dropout(branch(x))), padding_mask).to(x.dtype)


def make_blocks(make_mixer: Callable[[int], nn.Module], width: int, depth: int, *, drop_path: float = 0.0, **options) -> nn.ModuleList:
    """``depth`` blocks with ``make_mixer(layer)`` each; ``drop_path`` rises linearly from 0 in the first to its value in the last.

    ``options`` are those of ``Block``.
    """
    check_positive(width=width, depth=depth)
    rates = [drop_path * layer / max(1, depth - 1) for layer in range(depth)]
    return nn.ModuleList(Block(make_mixer(layer), width, drop_path=rate, **options) for layer, rate in enumerate(rates))


def run_block(block: nn.Module, x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """What a stack calls for each of its blocks: (B, L, width) -> (B, L, width)."""
    return block(x, padding_mask)


class MixerStack(nn.Module):
    """Base of models that hold mixers: runs their blocks, has one form for all that have forms, and the state size of all together.

    A subclass sets ``self.blocks``, modules with a ``mixer`` each. A mixer has ``forms`` (empty where it has but one way of computing),
    ``form`` where that is not empty, and ``state_size`` (None where a recurrent form would have no fixed one). One that can have its tokens
    on several ranks has ``sequence_ranks``, and ``sequence_conflict``, None or why its settings do not allow it.

    Attributes:
        sequence_ranks: the ranks that hold the sequences together, see ``set_sequence_group``; None: they are whole here.
        token_dimension: of the inputs.
        gradient_checkpointing: keep only each block's input in training and compute the block again in the backward pass: the same
            gradients for less memory and about a third more time.
    """

    blocks: Sequence[nn.Module]
    gradient_checkpointing: bool = False
    sequence_ranks: SequenceRanks | None = None
    token_dimension = 1
    run_block: Callable[..., Tensor] = staticmethod(run_block)

    def run_blocks(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, width) -> (B, L, width) through all blocks."""
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                options = {}
                # in a compiled model what changes a buffer is no part of what is computed again
                if not torch.compiler.is_compiling() and any(isinstance(module, BatchNorm) for module in block.modules()):
                    options["context_fn"] = lambda: (nullcontext(), recomputation())
                x = checkpoint(self.run_block, block, x, padding_mask, use_reentrant=False, **options)
            else:
                x = self.run_block(block, x, padding_mask)
        return x

    def count_tokens(self, inputs: Tensor) -> int:
        """Tokens in a batch of inputs without padding: what a rate of tokens per second counts."""
        return inputs.shape[0] * inputs.shape[1]

    @property
    def mixers(self) -> list[nn.Module]:
        return [block.mixer for block in self.blocks]

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that every linear layer has; empty for a model without linear layers."""
        forms = [mixer.forms for mixer in self.mixers if mixer.forms]
        return tuple(form for form in forms[0] if all(form in others for others in forms)) if forms else ()

    @property
    def form(self) -> str | None:
        """The form of the linear layers; None where there are none, or where they differ."""
        forms = {mixer.form for mixer in self.mixers if mixer.forms}
        return forms.pop() if len(forms) == 1 else None

    def set_form(self, form: str | None) -> str | None:
        """Switches every linear layer to ``form``, one of ``forms``, "fused" or "auto"; the weights stay, and so do softmax layers.

        Returns:
            The form before; None where the linear layers differed, or where there are none. ``set_form(None)`` changes nothing.

        Raises:
            ValueError: for an unknown form. Nothing is changed then.
        """
        if form is None:
            return self.form
        known = self.forms or ops.MODEL_FORMS
        choice("form", form, tuple(dict.fromkeys((*known, *(("fused",) if len(known) > 1 else ()), "auto"))))
        previous, before = self.form, [(mixer, mixer.form) for mixer in self.mixers if mixer.forms]
        try:
            for mixer, _ in before:
                mixer.form = form
        except ValueError:
            for mixer, own in before:
                mixer.form = own
            raise
        return previous

    def set_sequence_group(self, group: torch.distributed.ProcessGroup | None) -> None:
        """Splits sequences over the ranks of a process group: each then calls the model with its own block of consecutive tokens, of any
        length, and gets what the model on the whole sequences gives: logits of its own tokens, or, where a model pools them, the same
        logits on every rank. None: sequences are whole again.

        Every rank calls, with as many sequences, and takes part in the backward pass. The weights' gradients on the ranks are parts of the
        gradient of the sum of all ranks' losses: average them (as DistributedDataParallel does) where every rank has the same loss, sum
        them up where each has that of its own tokens.

        Raises:
            ValueError: a layer that cannot do that, named, or a group without this process. Nothing is changed then.
        """
        ranks = None if group is None else SequenceRanks(group)
        for layer, mixer in enumerate(self.mixers if ranks is not None else ()):
            unknown = None if hasattr(mixer, "sequence_ranks") else "it knows no other ranks"
            if (reason := getattr(mixer, "sequence_conflict", unknown)) is not None:
                raise ValueError(
                    f"sequence_group: expected linear attention with scan='raster' in every layer, got {type(mixer).__name__} in layer "
                    f"{layer}, whose tokens have to be on one device ({reason})"
                )
        for module in self.modules():
            if hasattr(module, "sequence_ranks"):
                module.sequence_ranks = ranks

    def share(self, batch: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
        """What a batch of whole sequences holds for one of ``size`` ranks: its block of all that has a value for each token, the rest as it
        is; ValueError for fewer tokens than ranks."""
        shape = batch["inputs"].shape[: self.token_dimension + 1]
        start, stop = block_bounds(shape[-1], rank, size)

        def own(value: Any) -> Any:
            of_tokens = isinstance(value, Tensor) and value.shape[: len(shape)] == shape
            return value.narrow(self.token_dimension, start, stop - start) if of_tokens else value

        return {name: own(value) for name, value in batch.items()}

    @property
    def state_size(self) -> int | None:
        """Numbers that the recurrent form holds per sequence, over all layers; None where a layer has no fixed size."""
        sizes = [mixer.state_size for mixer in self.mixers]
        return None if None in sizes else sum(sizes)


class CompiledBlocks:
    """Runs the blocks of a model compiled where that is asked for, and leaves the model as it is otherwise.

    Blocks that are alike share a graph, whatever their number: twelve take no longer to compile than two, and what is around them
    (embeddings, heads, a choice of positions) breaks no graph.

    Args:
        model: one with a ``MixerStack`` in it, or that is one.
    """

    def __init__(self, model: nn.Module):
        self._stacks = [module for module in model.modules() if isinstance(module, MixerStack)]
        self._run = torch.compile(run_block)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the model's forward pass runs its blocks compiled."""
        for stack in self._stacks:
            stack.run_block = self._run
        try:
            with torch._dynamo.config.patch(recompile_limit=GRAPHS):
                yield
        finally:
            for stack in self._stacks:
                del stack.run_block
