"""One class for an image: a vision Transformer with any mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lba_exp.models.pretrained import Pretrained
from lba_exp.nn.blocks import MixerStack, make_blocks
from lba_exp.nn.checks import check_padding_mask, check_positive
from lba_exp.nn.embeddings import ClassToken, PositionalEmbedding
from lba_exp.nn.pooling import POOLINGS, pool
from lba_exp.nn.sequence_ranks import block_bounds
from lba_exp.ops.checks import choice


class VisionTransformer(Pretrained, MixerStack):
    """Image -> patches (-> class token first, + positions) -> pre-norm blocks -> norm -> pooling -> classes (arXiv 2010.11929).

    The paper's sizes (arXiv 2502.16249): tiny 192 features and 3 heads, small 384 and 6, base 768 and 12, each with 12 blocks.

    Args:
        make_mixer: index of the layer -> its mixer, a module called as ``mixer(x, padding_mask)``; see ``MixerStack``.
        classes: number of classes.
        width: features per token.
        depth: number of blocks.
        channels: colours of the image.
        image_size: (height, width) in pixels; multiples of ``patch_size``.
        patch_size: height and width of a patch in pixels; a patch is a token, in row-major order.
        mlp, mlp_ratio, dropout, drop_path, norm_eps: see ``lba_exp.nn.blocks.Block``.
        positional_embedding: add a learned vector to each position, the class token's included. Needless with decay.
        pooling: ``"class_token"``, ``"mean_all"`` (over all tokens, the class token included) or ``"mean"`` (no class token).
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
        channels: int,
        image_size: Sequence[int],
        patch_size: int = 16,
        mlp: str = "mlp",
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        positional_embedding: bool = True,
        pooling: str = "class_token",
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        check_positive(classes=classes, width=width, depth=depth, channels=channels, patch_size=patch_size)
        choice("pooling", pooling, POOLINGS)
        self.image_size, self.patch_size, self.channels = tuple(image_size), patch_size, channels
        self.grid = patch_grid(self.image_size, patch_size)
        self.pooling, self.gradient_checkpointing = pooling, gradient_checkpointing
        self.patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.class_token = ClassToken(width) if pooling != "mean" else None
        tokens = self.grid[0] * self.grid[1] + (pooling != "mean")
        self.positions = PositionalEmbedding(tokens, width) if positional_embedding else None
        self.dropout = nn.Dropout(dropout)
        options = {"mlp": mlp, "mlp_ratio": mlp_ratio, "dropout": dropout, "norm_eps": norm_eps}
        self.blocks = make_blocks(make_mixer, width, depth, drop_path=drop_path, **options)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Logits of the classes.

        Args:
            inputs: (B, channels, height, width) of a floating dtype, of the model's image size. Where there is no positional embedding,
                and the mixers are not bound to a grid, any multiple of the patch size will do. Split over ranks: whole rows of patches.
            padding_mask: (B, patches) bool, False at patches that are to be left out, in row-major order; None where none are.

        Returns:
            (B, classes), in the dtype of the weights or of autocast.

        Raises:
            ValueError: for inputs or a mask of another shape or dtype.
        """
        self._check_inputs(inputs)
        weight = self.patches.weight
        x = self.patches(inputs.to(weight.dtype)).to(weight.dtype).flatten(2).transpose(1, 2)
        check_padding_mask(padding_mask, *x.shape[:2])
        if padding_mask is not None:
            x = x.masked_fill(~padding_mask.unsqueeze(-1), 0)
        if self.class_token is not None:
            x, padding_mask = self.class_token(x, padding_mask)
        if self.positions is not None:
            x = self.positions(x)
        x = self.run_blocks(self.dropout(x), padding_mask)
        return self.head(pool(self.norm(x), padding_mask, self.pooling, self.sequence_ranks))

    def count_tokens(self, inputs: Tensor) -> int:
        return inputs.shape[0] * (inputs.shape[2] // self.patch_size) * (inputs.shape[3] // self.patch_size)

    def share(self, batch: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
        """As in ``MixerStack``; a rank has whole rows of patches, and calls the model with that band of the image."""
        inputs, mask = batch["inputs"], batch.get("padding_mask")
        start, stop = block_bounds(inputs.shape[2] // self.patch_size, rank, size)
        found = dict(batch) | {"inputs": inputs[:, :, start * self.patch_size : stop * self.patch_size]}
        if mask is not None:
            columns = inputs.shape[3] // self.patch_size
            found["padding_mask"] = mask[:, start * columns : stop * columns]
        return found

    def _check_inputs(self, inputs: Tensor) -> None:
        valid = inputs.ndim == 4 and inputs.shape[1] == self.channels and inputs.is_floating_point()
        if self.positions is not None:
            ranks = self.sequence_ranks
            height = inputs.shape[2] if ranks is None or not valid else sum(ranks.lengths(inputs.shape[2], inputs.device))
            valid = valid and (height, inputs.shape[3]) == self.image_size and inputs.shape[2] % self.patch_size == 0
            expected = f"(B, {self.channels}, {self.image_size[0]}, {self.image_size[1]})"
        else:
            valid = valid and all(side >= self.patch_size and side % self.patch_size == 0 for side in inputs.shape[2:])
            expected = f"(B, {self.channels}, height, width), both multiples of the patch size {self.patch_size},"
        if not valid:
            raise ValueError(f"inputs: expected {expected} of a floating dtype, got {inputs.dtype} of shape {tuple(inputs.shape)}")


def patch_grid(image_size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches; ValueError where the patch size does not divide the image."""
    if len(image_size) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in image_size):
        raise ValueError(f"image_size: expected (height, width) in pixels, got {image_size!r}")
    if any(side % patch_size for side in image_size):
        raise ValueError(f"patch_size: expected a divisor of the image's height and width {tuple(image_size)}, got {patch_size}")
    return image_size[0] // patch_size, image_size[1] // patch_size
