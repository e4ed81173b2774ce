"""A depthwise convolution over tokens: what state space models and delta rules put before their operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lba_exp.nn.checks import check_padding_mask, check_positive
from lba_exp.ops.checks import choice


class TokenConvolution(nn.Module):
    """Each channel by itself, over the token and its neighbours: (B, L, channels) -> (B, L, channels).

    Ends are padded with 0, and padded tokens count as 0, whatever stands there: padding at either end equals cutting it off.

    Args:
        channels: features per token.
        width: tokens that are read, the token itself among them.
        direction: ``"both"``: as many before it as after it, so that width is odd; ``"forward"``: those before it (causal);
            ``"backward"``: those after it.
        bias: add a learned number to each channel.

    Raises:
        ValueError: for a value that is not valid.
    """

    def __init__(self, channels: int, width: int, direction: str = "both", bias: bool = True):
        super().__init__()
        check_positive(channels=channels, width=width)
        choice("direction", direction, ("both", "forward", "backward"))
        if direction == "both" and width % 2 == 0:
            raise ValueError(f"convolution: expected an odd number of tokens for direction='both', got {width}")
        before = {"both": width // 2, "forward": width - 1, "backward": 0}[direction]
        self.margins = (before, width - 1 - before)
        self.convolution = nn.Conv1d(channels, channels, width, groups=channels, bias=bias)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """padding_mask: (B, L) bool, True at real tokens; or None."""
        check_padding_mask(padding_mask, *x.shape[:2])
        if padding_mask is not None:
            x = torch.where(padding_mask[..., None], x, 0)
        return self.convolution(F.pad(x.mT, self.margins)).mT
