"""Peak memory of a piece of code, on the CPU by following tensors and on CUDA by asking the allocator."""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

LIVE_TENSORS = "live tensors"
CUDA_ALLOCATOR = "cuda allocator"
TORCHS_OWN = ("aten", "prim", "prims")  # namespaces of operations that are single kernels
CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class LiveTensors:
    """Context manager: the most bytes that tensors created inside the block held at one time.

    On the CPU every operation is followed: a storage counts from its creation until it is freed, views share their base's storage, what
    autograd saves stays alive and counts. What existed before the block never counts, except by how much the block enlarges it. Scratch
    space inside a single kernel is not seen, and compiled functions run uncompiled. On CUDA the figure is the allocator's peak above the
    bytes allocated at entry.

    Args:
        device: where the code runs; ``cpu`` or ``cuda``, anything else gives no figure.

    Attributes (after the block):
        bytes: the peak in bytes, or None where it cannot be had (other devices, tensors without a storage, a block that raised).
        method: ``"live tensors"``, ``"cuda allocator"`` or None.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.method = {"cpu": LIVE_TENSORS, "cuda": CUDA_ALLOCATOR}.get(self.device.type)
        self.bytes: int | None = None

    def __enter__(self) -> LiveTensors:
        self.bytes = None
        if self.device.type == "cpu":
            self._follower = _Follower()
            self._follower.__enter__()
        elif self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._at_entry = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.device.type == "cpu":
            self._follower.__exit__(kind, error, trace)
            if kind is None and self._follower.complete:
                self.bytes = self._follower.peak
        elif self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            if kind is None:
                self.bytes = torch.cuda.max_memory_allocated(self.device) - self._at_entry


class _Follower(TorchDispatchMode):
    """Sees every operation and keeps the sum of the storages created while it is active."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.complete = True  # False once a tensor without a readable storage went by
        self._known: dict[int, list] = {}  # id of a storage -> [weak reference, bytes before the block, bytes counted now]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # under inference_mode composite operations arrive whole: taken apart, so that their temporaries are seen too
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        self._see((args, kwargs), new=False)
        if func.namespace not in TORCHS_OWN and _all_on_cpu((args, kwargs)):
            with self:  # an operation that may be written in Python: followed inside, where it would run unseen
                result = func.redispatch(CPU_KERNELS, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        self._see(result, new=True)
        return result

    def _see(self, values, new: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, torch.Tensor) or (value.layout is torch.strided and value.device.type != "cpu"):
                continue
            if is_traceable_wrapper_subclass(value):  # its storage is a fiction
                self.complete = False
                continue
            try:
                storage = value.untyped_storage()
                size = storage.nbytes()
            except RuntimeError:  # torch of sparse and opaque tensors: no storage, so no figure rather than a wrong one
                self.complete = False
                continue
            key = id(storage)
            entry = self._known.get(key)
            if entry is None:
                # The storage dies with its last tensor or saved tensor; its id may then be used again.
                entry = self._known[key] = [weakref.ref(storage, partial(self._forget, key)), 0 if new else size, 0]
            counted = max(size - entry[1], 0)
            self.live += counted - entry[2]
            entry[2] = counted
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, _) -> None:
        self.live -= self._known.pop(key)[2]


def _all_on_cpu(values) -> bool:
    return {value.device.type for value in tree_leaves(values) if isinstance(value, torch.Tensor)} == {"cpu"}
