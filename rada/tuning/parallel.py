"""A model that trains in FSDP2's shards on several ranks, and its state as that of one process.

Each rank holds its part of weights, gradients and optimizer; a block's weights are whole while it computes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rada.distributed import ranks


def sharded(model: nn.Module, device: torch.device) -> Any:
    """A copy of the model in shards on the ranks' devices of that type, each block of a list of layers by itself.

    Parameters of no dimension, which FSDP2 does not take, have one in the copy.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks()[1],))
    shards = copy.deepcopy(model)
    for module in shards.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.dim():
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))
    for layers in [module for module in shards.modules() if isinstance(module, nn.ModuleList)]:
        for block in layers:
            fully_shard(block, mesh=mesh)
    return fully_shard(shards, mesh=mesh)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict; every rank calls it, and has all of it."""
    return {name: _whole(tensor) for name, tensor in model.state_dict().items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load `whole_weights`, of a model in shards or not, into one in shards or not. Every rank has them."""
    model.load_state_dict({name: _as(like, weights[name]) for name, like in model.state_dict().items()})


def whole_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state dict, as of one process; every rank calls it, and has all of it."""
    state = optimizer.state_dict()
    of_each = {i: {key: _whole(value) for key, value in of.items()} for i, of in state["state"].items()}
    return {**state, "state": of_each}


def load_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load `whole_state`, of a model in shards or not, into the optimizer of one in shards or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_each = {
        i: {key: value if key == "step" else _as(parameters[i], value) for key, value in of.items()}
        for i, of in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_each})


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _as(like: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor in the shape of another, and in shards as that one is."""
    whole = whole.reshape(like.shape)
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
