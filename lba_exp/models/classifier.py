"""One class for a whole sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lba_exp.nn.blocks import MixerStack, PreNormBlock
from lba_exp.nn.checks import check_padding_mask, check_positive
from lba_exp.nn.embeddings import ClassToken, PositionalEmbedding, channel_embedding, symbol_embedding
from lba_exp.ops.checks import choice

POOLINGS = ("mean", "class_token")


class SequenceClassifier(MixerStack):
    """Tokens -> embedding (+ positions) -> pre-norm blocks -> norm -> pooling -> classes.

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
        mlp_ratio: hidden width of each MLP over width.
        dropout: on the residual branches.
        positional_embedding: add a learned vector to each position. The inputs may then have at most ``length`` tokens.
        pooling: ``"mean"`` over the real tokens, or ``"class_token"``, a learned token put first.

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
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        positional_embedding: bool = True,
        pooling: str = "mean",
    ):
        super().__init__()
        check_positive(classes=classes, width=width, depth=depth)
        choice("pooling", pooling, POOLINGS)
        if (channels is None) == (vocabulary is None):
            raise ValueError(f"channels, vocabulary: expected exactly one of them, got channels={channels} and vocabulary={vocabulary}")
        if positional_embedding and length is None:
            raise ValueError("length: expected the number of positions, which a positional embedding needs, got None")
        self.embedding = symbol_embedding(vocabulary, width) if channels is None else channel_embedding(channels, width)
        self.channels = channels
        self.positions = PositionalEmbedding(length, width) if positional_embedding else None
        self.class_token = ClassToken(width) if pooling == "class_token" else None
        self.blocks = nn.ModuleList(PreNormBlock(make_mixer(layer), width, mlp_ratio=mlp_ratio, dropout=dropout) for layer in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

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
        self._check_inputs(inputs)
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
        for block in self.blocks:
            x = block(x, padding_mask)
        return self.head(self._pool(self.norm(x), padding_mask))

    def _pool(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        if self.class_token is not None:
            return x[:, 0]
        if padding_mask is None:
            return x.mean(1)
        tokens = padding_mask.sum(1, keepdim=True).clamp(min=1)
        return x.masked_fill(~padding_mask.unsqueeze(-1), 0).sum(1) / tokens

    def _check_inputs(self, inputs: Tensor) -> None:
        shape = tuple(inputs.shape)
        if self.channels is None:
            valid = inputs.ndim == 2 and inputs.shape[1] >= 1 and not inputs.is_floating_point() and inputs.dtype != torch.bool
            expected = "(B, L) of an integer dtype"
        else:
            valid = inputs.ndim == 3 and inputs.shape[1] >= 1 and inputs.shape[2] == self.channels and inputs.is_floating_point()
            expected = f"(B, L, {self.channels}) of a floating dtype"
        if not valid:
            raise ValueError(f"inputs: expected {expected}, with L >= 1, got {inputs.dtype} of shape {shape}")
