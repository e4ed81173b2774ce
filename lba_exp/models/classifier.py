"""One class for a whole sequence, or for a pair of sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lba_exp.models.pretrained import Pretrained
from lba_exp.nn.blocks import MixerStack, make_blocks
from lba_exp.nn.checks import check_padding_mask, check_positive
from lba_exp.nn.embeddings import ClassToken, PositionalEmbedding, channel_embedding, symbol_embedding
from lba_exp.nn.norms import make_norm, normalise
from lba_exp.nn.pooling import POOLINGS, pool
from lba_exp.ops.checks import choice


class SequenceClassifier(Pretrained, MixerStack):
    """Tokens -> embedding (+ positions) -> blocks -> norm (pre-norm alone) -> pooling -> classes.

    Without positional embedding and with mean pooling the model cannot tell a sequence from its reverse (an image of a 6 read row by row
    from a 9): with the conventions ``key`` and ``query``, and with fixed or no decay, reversing the tokens reverses every layer's
    outputs. The convention ``symmetric`` with a selective gate is not blind to it: it takes the later of two tokens' gates.

    Args:
        make_mixer: index of the layer -> its mixer, a module called as ``mixer(x, padding_mask)``; see ``MixerStack``.
        classes: number of classes.
        width: features per token.
        depth: number of blocks.
        channels: features of an input token, for inputs (B, L, channels) of real numbers; or
        vocabulary: number of symbols, for inputs (B, L) of integers. Exactly one of the two.
        length: number of positions; needed for, and used by, the positional embedding alone.
        mlp, mlp_ratio, dropout, drop_path, norm, norm_position: see ``lba_exp.nn.blocks.Block``.
        positional_embedding: add a learned vector to each position. The inputs may then have at most ``length`` tokens.
        pooling: ``"mean"`` over the real tokens, ``"class_token"``, a learned token put first, or ``"mean_all"``, the mean over the real
            tokens and a class token.
        gradient_checkpointing: see ``MixerStack``.

    Raises:
        ValueError: for a value that is not valid.
    """

    def __init__(
        self,
        *,
        make_mixer: Callable[[int], nn.Module],
        classes: int,
        width: int,
        depth: int,
        channels: int | None = None,
        vocabulary: int | None = None,
        length: int | None = None,
        mlp: str = "mlp",
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm: str = "layer",
        norm_position: str = "pre",
        positional_embedding: bool = True,
        pooling: str = "mean",
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        check_positive(classes=classes, width=width, depth=depth)
        choice("pooling", pooling, POOLINGS)
        if (channels is None) == (vocabulary is None):
            raise ValueError(f"channels, vocabulary: expected exactly one of them, got channels={channels} and vocabulary={vocabulary}")
        if positional_embedding and length is None:
            raise ValueError("length: expected the number of positions, which a positional embedding needs, got None")
        self.embedding = symbol_embedding(vocabulary, width) if channels is None else channel_embedding(channels, width)
        self.channels, self.pooling, self.gradient_checkpointing = channels, pooling, gradient_checkpointing
        self.positions = PositionalEmbedding(length, width) if positional_embedding else None
        self.class_token = ClassToken(width) if pooling != "mean" else None
        options = {"mlp": mlp, "mlp_ratio": mlp_ratio, "dropout": dropout, "norm": norm, "norm_position": norm_position}
        self.blocks = make_blocks(make_mixer, width, depth, drop_path=drop_path, **options)
        self.norm = make_norm(norm, width, 1e-5) if norm_position == "pre" else nn.Identity()
        self.head = self._make_head(width, classes)

    def _make_head(self, width: int, classes: int) -> nn.Module:
        return nn.Linear(width, classes)

    def forward(self, inputs: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Logits of the classes.

        Args:
            inputs: (B, L, channels) of a floating dtype, or (B, L) of an integer dtype; L >= 1. What stands at padded positions never
                matters, NaN and symbols outside the vocabulary included.
            padding_mask: (B, L) bool, True at real tokens; None where all are. A sequence of padding alone gets finite logits.

        Returns:
            (B, classes), in the dtype of the weights or of autocast.

        Raises:
            ValueError: for inputs or a mask of another shape or dtype, and for more tokens than there are positions.
        """
        self._check_inputs(inputs, "")
        return self.head(self.encode(inputs, padding_mask))

    def encode(self, inputs: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """One vector a sequence, (B, width); arguments as in ``forward``."""
        check_padding_mask(padding_mask, *inputs.shape[:2])
        if padding_mask is not None:
            inputs = inputs.masked_fill(~(padding_mask if self.channels is None else padding_mask.unsqueeze(-1)), 0)
        weight = self.embedding.weight
        # back to the weights' dtype: autocast would leave the residual stream in half precision
        x = self.embedding(inputs.long() if self.channels is None else inputs.to(weight.dtype)).to(weight.dtype)
        if self.positions is not None:
            x = self.positions(x)
        if self.class_token is not None:
            x, padding_mask = self.class_token(x, padding_mask)
        x = self.run_blocks(x, padding_mask)
        return pool(normalise(self.norm, x, padding_mask), padding_mask, self.pooling, self.sequence_ranks)

    def _check_inputs(self, inputs: Tensor, pair: str) -> None:
        shape, dimensions = tuple(inputs.shape), 3 if pair else 2
        if self.channels is None:
            valid = inputs.ndim == dimensions and not inputs.is_floating_point() and inputs.dtype != torch.bool
            expected = f"(B, {pair}L) of an integer dtype"
        else:
            valid = inputs.ndim == dimensions + 1 and inputs.shape[-1] == self.channels and inputs.is_floating_point()
            expected = f"(B, {pair}L, {self.channels}) of a floating dtype"
        if not valid or shape[dimensions - 1] < 1 or (pair and shape[1] != 2):
            raise ValueError(f"inputs: expected {expected}, with L >= 1, got {inputs.dtype} of shape {shape}")


class TwoTowers(SequenceClassifier):
    """One class for a pair of sequences, both encoded by the same weights (the retrieval task of Long Range Arena, arXiv 2011.04006).

    From the two vectors a and b the classes are W2 GELU(W1 [a, b, a * b, a - b] + b1) + b2. Arguments as of ``SequenceClassifier``.
    """

    token_dimension = 2

    def count_tokens(self, inputs: Tensor) -> int:
        return inputs.shape[0] * inputs.shape[1] * inputs.shape[2]

    def _make_head(self, width: int, classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, classes))

    def forward(self, inputs: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Logits of the classes.

        Args:
            inputs: (B, 2, L) of an integer dtype, or (B, 2, L, channels) of a floating one; L >= 1.
            padding_mask: (B, 2, L) bool, True at real tokens; None where all are.

        Returns:
            (B, classes), in the dtype of the weights or of autocast.

        Raises:
            ValueError: for inputs or a mask of another shape or dtype, and for more tokens than there are positions.
        """
        self._check_inputs(inputs, "2, ")
        if padding_mask is not None:
            if padding_mask.shape != inputs.shape[:3]:
                expected, given = tuple(inputs.shape[:3]), tuple(padding_mask.shape)
                raise ValueError(f"padding_mask: expected torch.bool of shape {expected}, True = real token, got shape {given}")
            padding_mask = padding_mask.flatten(0, 1)
        first, second = self.encode(inputs.flatten(0, 1), padding_mask).unflatten(0, (-1, 2)).unbind(1)
        return self.head(torch.cat([first, second, first * second, first - second], dim=-1))
