"""Models of text: a masked language model in the shape of BERT, its twin that gives a text a class, and a causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.models.pretrained import Pretrained
from lba_exp.nn.blocks import MixerStack, make_blocks
from lba_exp.nn.checks import check_padding_mask, check_positive
from lba_exp.nn.embeddings import PositionalEmbedding, TokenTypes, symbol_embedding
from lba_exp.nn.pooling import first_token


class TextEncoder(MixerStack):
    """Token (+ position + token type) embeddings -> blocks: (B, L) of integers -> (B, L, width).

    Post-norm (BERT, arXiv 1810.04805) has a norm after the embeddings, pre-norm one after the blocks.

    Args:
        make_mixer: index of the layer -> its mixer, a module called as ``mixer(x, padding_mask)``; see ``MixerStack``.
        vocabulary: number of tokens.
        width: features per token.
        depth: number of blocks.
        length: number of positions; needed for, and used by, the positional embedding alone.
        token_types: number of token types (BERT: 2, first and second text); 0: none.
        mlp, mlp_ratio, dropout, drop_path, norm_position, norm_eps: see ``lba_exp.nn.blocks.Block``.
        positional_embedding: add a learned vector to each position. The inputs may then have at most ``length`` tokens.
        gradient_checkpointing: see ``MixerStack``.

    Raises:
        ValueError: for a value that is not valid.
    """

    def __init__(
        self,
        *,
        make_mixer: Callable[[int], nn.Module],
        vocabulary: int,
        width: int,
        depth: int,
        length: int | None = None,
        token_types: int = 2,
        mlp: str = "mlp",
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        norm_position: str = "post",
        norm_eps: float = 1e-12,
        positional_embedding: bool = True,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        check_positive(vocabulary=vocabulary, width=width, depth=depth)
        if positional_embedding and length is None:
            raise ValueError("length: expected the number of positions, which a positional embedding needs, got None")
        self.embedding = symbol_embedding(vocabulary, width)
        self.positions = PositionalEmbedding(length, width) if positional_embedding else None
        self.token_types = TokenTypes(token_types, width) if token_types else None
        options = {"mlp": mlp, "mlp_ratio": mlp_ratio, "dropout": dropout, "norm_position": norm_position, "norm_eps": norm_eps}
        self.dropout = nn.Dropout(dropout)
        self.blocks = make_blocks(make_mixer, width, depth, drop_path=drop_path, **options)
        post, norm = norm_position == "post", nn.LayerNorm(width, eps=norm_eps)
        self.embedding_norm, self.norm = (norm, nn.Identity()) if post else (nn.Identity(), norm)
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, inputs: Tensor, padding_mask: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """Features of every token, (B, L, width); ValueError for arguments of another shape or dtype than those of ``MaskedLM``."""
        _check_tokens("inputs", inputs)
        check_padding_mask(padding_mask, *inputs.shape)
        if padding_mask is not None:
            inputs = inputs.masked_fill(~padding_mask, 0)
        x = self.embedding(inputs.long())
        if self.positions is not None:
            x = self.positions(x)
        if self.token_types is not None:
            x = self.token_types(x, token_types, padding_mask)
        elif token_types is not None:
            raise ValueError("token_types: expected None, as this model has no token types")
        # autocast's norm may leave the residual stream in another dtype
        x = self.dropout(self.embedding_norm(x).to(self.embedding.weight.dtype))
        return self.norm(self.run_blocks(x, padding_mask))


class TextModel(Pretrained, MixerStack):
    """Base of models with a ``TextEncoder``, ``self.encoder``: they have its blocks, forms and state size.

    Two of them share an encoder's weights by ``first.encoder.load_state_dict(second.encoder.state_dict())``.
    """

    encoder: TextEncoder

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.blocks


def takes_arguments_of(base: type, *but: str) -> Callable[[type], type]:
    """Decorator for a class that hands its ``**options`` on to ``base``: gives its signature the arguments of ``base`` but some."""

    def decorate(cls: type) -> type:
        own = {name: p for name, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD}
        theirs = {name: p for name, p in inspect.signature(base).parameters.items() if name not in {*own, *but}}
        cls.__signature__ = inspect.Signature([*own.values(), *theirs.values()])
        return cls

    return decorate


@takes_arguments_of(TextEncoder)
class MaskedLM(TextModel):
    """Logits of the token at every position: encoder -> dense, GELU, norm -> the token embeddings again (tied), and a bias.

    Arguments as of ``TextEncoder``.
    """

    def __init__(self, *, width: int, vocabulary: int, norm_eps: float = 1e-12, **options):
        super().__init__()
        self.encoder = TextEncoder(width=width, vocabulary=vocabulary, norm_eps=norm_eps, **options)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=norm_eps))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(
        self,
        inputs: Tensor,
        padding_mask: Tensor | None = None,
        token_types: Tensor | None = None,
        selected: Tensor | None = None,
    ) -> Tensor:
        """Logits of the tokens.

        Args:
            inputs: (B, L) of an integer dtype. What stands at padded positions never matters, numbers outside the vocabulary included.
            padding_mask: (B, L) bool, True at real tokens; None where all are.
            token_types: (B, L) of an integer dtype; None: all of type 0.
            selected: (B, L) bool, the n positions whose logits are wanted; None: all.

        Returns:
            (B, L, vocabulary), or (n, vocabulary) in row-major order of the positions; in the dtype of the weights or of autocast.

        Raises:
            ValueError: for arguments of another shape or dtype, and for more tokens than there are positions.
        """
        x = self.encoder(inputs, padding_mask, token_types)
        if selected is not None:
            x = x[selected]
        return F.linear(self.transform(x), self.encoder.embedding.weight, self.bias)


@takes_arguments_of(TextEncoder)
class TextClassifier(TextModel):
    """One class for a text, from its first token ([CLS]): encoder -> dense, tanh -> dropout -> classes (BERT's recipe for GLUE).

    Attributes:
        own_parts: modules that start anew where the weights to start from have none, or none that fit.

    Args:
        classes: number of classes; 1: the output is a number.
        dropout: before the classes too.
        others: as of ``TextEncoder``.
    """

    own_parts = ("pooler", "head")

    def __init__(self, *, classes: int, width: int, dropout: float = 0.1, **options):
        super().__init__()
        check_positive(classes=classes)
        self.encoder = TextEncoder(width=width, dropout=dropout, **options)
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor, padding_mask: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """Logits (B, classes); arguments as of ``MaskedLM``."""
        return self.head(self.dropout(self.pooler(first_token(self.encoder(inputs, padding_mask, token_types), self.sequence_ranks))))


@takes_arguments_of(TextEncoder, "token_types")
class CausalLM(TextModel):
    """Logits of the next token at every position, from what stands before it alone; decoder and token embeddings are tied.

    Arguments as of ``TextEncoder``, without token types and pre-norm unless asked otherwise. ``make_mixer`` has to make mixers of
    ``direction="forward"``; ValueError where it does not. LION with one direction is the causal model it comes from (arXiv 2502.16249).
    """

    def __init__(self, *, norm_position: str = "pre", norm_eps: float = 1e-5, **options):
        super().__init__()
        self.encoder = TextEncoder(token_types=0, norm_position=norm_position, norm_eps=norm_eps, **options)
        for layer, mixer in enumerate(self.mixers):
            if (direction := getattr(mixer, "direction", "both")) != "forward":
                raise ValueError(f"direction: expected 'forward' in every mixer of a causal model, got {direction!r} in layer {layer}")

    def forward(self, inputs: Tensor, padding_mask: Tensor | None = None, selected: Tensor | None = None) -> Tensor:
        """Logits (B, L, vocabulary), or (n, vocabulary) at the ``selected`` positions; arguments as of ``MaskedLM``."""
        x = self.encoder(inputs, padding_mask)
        if selected is not None:
            x = x[selected]
        return F.linear(x, self.encoder.embedding.weight)


def _check_tokens(argument: str, tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.shape[1] < 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        given = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        raise ValueError(f"{argument}: expected (B, L) of an integer dtype, with L >= 1, got {given}")
