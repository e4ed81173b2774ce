"""A sequence whose tokens lie on several ranks: what a layer that looks beyond its own tokens asks of the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from lba_exp.ops.ranks import check_group, gather


class SequenceRanks:
    """The ranks of a process group that hold a sequence together, each a block of consecutive tokens, in the order of the ranks.

    Modules keep it as ``sequence_ranks`` (None: the whole sequence is here). A copy of such a module shares the group; one read from a
    file has none.

    Args:
        group: ValueError where this process is not in it.

    Attributes:
        rank, size: which of how many.
    """

    def __init__(self, group: dist.ProcessGroup):
        check_group(group)
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict) -> SequenceRanks:
        return self  # a process group cannot be copied

    def __reduce__(self) -> tuple:
        return type(None), ()

    @property
    def first(self) -> bool:
        """Whether the sequence begins here."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the ranks, the same on each."""
        return gather(x, self.group).sum(0)

    def before(self, x: Tensor) -> Tensor:
        """x summed over the ranks with earlier tokens."""
        return gather(x, self.group)[: self.rank].sum(0)

    def after(self, x: Tensor) -> Tensor:
        """x summed over the ranks with later tokens."""
        return gather(x, self.group)[self.rank + 1 :].sum(0)

    def of_first(self, x: Tensor) -> Tensor:
        """The first rank's x."""
        return gather(x, self.group)[0]

    def lengths(self, length: int, device: torch.device) -> list[int]:
        """Tokens on each rank; waits for the device."""
        return gather(torch.tensor(length, device=device), self.group).tolist()


def block_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """First token, and the one after the last, of a rank's block where ``length`` tokens are shared out evenly."""
    if length < size:
        raise ValueError(f"length: expected at least {size} tokens, one for each of the devices that share a sequence, got {length}")
    return length * rank // size, length * (rank + 1) // size
