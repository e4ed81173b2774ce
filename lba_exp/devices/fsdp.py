"""Fully sharded data parallelism (torch's ``fully_shard``, FSDP2) as a Lightning strategy whose checkpoints are one plain file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from torch.optim import Optimizer

from lba_exp.devices.sharding import gathered, load_weights, piece

NAME = "fsdp2"


class FullyShardedStrategy(ModelParallelStrategy):
    """Every device holds a piece of each weight, its gradient and its optimizer state; the task shards its model in ``configure_model``.

    A checkpoint holds whole tensors, numbered as torch's optimizers number them, in one file: any strategy and any number of devices goes
    on from it. (Lightning's own way with one file renumbers the optimizer's state by the order of the module's parameters, which is not
    that of the optimizer where there are several parameter groups.)
    """

    strategy_name = NAME

    def __init__(self, **settings: Any):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {name: self._for_file(value) for name, value in self.lightning_module.state_dict().items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        load_weights(self.lightning_module, checkpoint["state_dict"])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = getattr(optimizer, "optimizer", optimizer).state_dict()
        per_parameter = {number: {key: self._for_file(value) for key, value in values.items()} for number, values in state["state"].items()}
        return state | {"state": per_parameter}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            owner = dict(zip(numbers, parameters, strict=True))
            pieces = {
                number: {key: _piece_of_state(value, owner[number]) for key, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict(dict(state) | {"state": pieces})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)

    def _for_file(self, value: Any) -> Any:
        """The whole tensor on the CPU of the first process, which writes; the others take part and keep nothing."""
        value = gathered(value)
        return value.cpu() if isinstance(value, Tensor) and self.is_global_zero else None if isinstance(value, Tensor) else value


def _piece_of_state(value: Any, parameter: torch.nn.Parameter) -> Any:
    same = isinstance(value, Tensor) and value.shape == parameter.shape
    return piece(value, parameter) if same else value


StrategyRegistry.register(
    NAME, FullyShardedStrategy, description="Fully sharded data parallelism, FSDP2: weights, gradients, optimizer state", override=True
)
