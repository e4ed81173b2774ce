"""What the fused form's kernels write to, filled with NaN first: whatever they leave out, or read before it is written, shows."""

from contextlib import contextmanager

import torch

from lba_exp.ops.fused import launch, sizes


class _Torch:
    """torch, with memory that is never empty by luck."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*args, **options):
        x = torch.empty(*args, **options)
        return x.fill_(float("nan") if x.is_floating_point() else 113)


@contextmanager
def poisoned():
    launch.torch = sizes.torch = _Torch()
    try:
        yield
    finally:
        launch.torch = sizes.torch = torch
