"""Weights cut into one piece a device (FSDP2), and put together again for a checkpoint or a check.

Whatever is gathered or cut here is so on all devices at once: each of them has to call.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_SKELETON = "_skeleton_before_sharding"  # an attribute, not a submodule: it is in no state dict


def shard(model: nn.Module, mesh: DeviceMesh, *, compiled: bool = False) -> None:
    """Shards every block of a model (the modules in an attribute ``blocks``, at any depth), then the rest; once.

    Args:
        model: with plain weights, the same on every device.
        mesh: of one dimension, the devices that share the weights.
        compiled: compile what a block does between the gathering of its weights and their release.
    """
    if is_sharded(model):
        return
    model.__dict__[_SKELETON] = skeleton(model)
    # always whole inside a forward and a backward pass alone, the root too: its weights are then pieces wherever a checkpoint is written
    blocks = [block for module in reversed(list(model.modules())) for block in getattr(module, "blocks", ())]
    for block in dict.fromkeys(blocks):  # a model may show its encoder's blocks as its own
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        if compiled:
            block.forward = torch.compile(block.forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, which has shapes and no values and takes no memory; of a sharded one, as it was before."""
    if _SKELETON in model.__dict__:
        return copy.deepcopy(model.__dict__[_SKELETON])
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def whole(model: nn.Module) -> nn.Module:
    """A plain copy of a sharded model with all its weights on this device, in the same form and mode."""
    plain = skeleton(model)
    plain.load_state_dict({name: gathered(value) for name, value in model.state_dict().items()}, assign=True)
    for name, buffer in model.named_buffers():  # those that no state dict holds
        owner, _, last = name.rpartition(".")
        plain.get_submodule(owner)._buffers[last] = gathered(buffer)
    if getattr(model, "form", None) is not None and getattr(model, "forms", ()):
        plain.set_form(model.form)
    return plain.train(model.training)


def gathered(value: Any) -> Any:
    """The whole of a sharded tensor on this device; anything else as it is."""
    return value.detach().full_tensor() if isinstance(value, DTensor) else value


def piece(value: Tensor, like: Tensor) -> Tensor:
    """This device's piece of a whole tensor, cut as ``like`` is; the tensor itself where ``like`` is not sharded."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``module.load_state_dict(state)`` with whole tensors, for a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({name: piece(value, own[name]) if name in own else value for name, value in state.items()})
