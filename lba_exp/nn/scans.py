"""Orders in which the tokens of a grid are read, and directions in which a layer reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from lba_exp.ops.checks import choice

SCANS = {"raster": ("raster",), "snake": ("snake",), "multi": ("snake", "snake_transposed")}
DIRECTIONS = ("both", "forward", "backward", "alternating")


def direction_of_layer(direction: str, layer: int) -> str:
    """What the operator is told: ``"alternating"`` is forward in layers 0, 2, ... and backward in layers 1, 3, ..."""
    choice("direction", direction, DIRECTIONS)
    if direction != "alternating":
        return direction
    return "backward" if layer % 2 else "forward"


def scan_order(order: str, grid: tuple[int, int], class_token: bool) -> Tensor:
    """The tokens in the order in which a scan reads them, (L,) int64, for a grid stored row by row.

    ``"snake"``: the rows from left to right and from right to left in turn; ``"snake_transposed"``: the columns downwards and upwards in
    turn. A class token is token 0 and stays first.
    """
    places = torch.arange(grid[0] * grid[1]).view(grid)
    if order == "snake_transposed":
        places = places.T
    if order != "raster":
        places = places.clone()
        places[1::2] = places[1::2].flip(1)
    places = places.flatten()
    return torch.cat([places.new_zeros(1), places + 1]) if class_token else places
