"""What a launch is asked for, and in which sizes and dtypes it is done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """What one call of the operator asks for.

    Attributes:
        weight, forward, backward: the diagonal's weight, and which directions are read.
        scaled: the denominator is made; divided: the output is num / (den + eps), else num.
    """

    weight: float
    forward: bool
    backward: bool
    scaled: bool
    divided: bool
    eps: float

    def is_linear(self, f: Tensor | None, g: Tensor | None) -> bool:
        """Whether every pair of tokens has the weight 1."""
        return f is None and g is None and self.weight == 1.0 and self.forward and self.backward


class Sizes:
    """Shapes, dtypes and device of one call, and memory for it."""

    def __init__(self, q: Tensor, v: Tensor):
        self.B, self.L, self.H, self.D = q.shape
        self.DV = v.shape[3]
        self.BH = self.B * self.H
        self.BD, self.BDV = (max(16, triton.next_power_of_2(x)) for x in (self.D, self.DV))
        self.width = max(self.BD, self.BDV)
        full = q.dtype == torch.float32
        self.dtype = torch.float32 if full else torch.bfloat16  # float16 has too few exponents for sums and gradients
        self.compute = tl.float32 if full else tl.bfloat16
        tf32 = full and torch.get_float32_matmul_precision() != "highest"
        self.precision = "tf32" if tf32 else "ieee"
        self.device = q.device

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def rows_last(x: Tensor) -> Tensor:
    """x with channels next to each other, as the kernels read them; any strides otherwise."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
