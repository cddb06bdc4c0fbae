"""What a checkpoint holds of a model, its optimizer and the random numbers, as a flat dict of tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lrdint_tune.models.decoder import is_new_tensor
from lrdint_tune.training.schedule import set_rate

MODEL, OPTIMIZER = "model.", "optimizer."
_PLAIN = (bool, int, float, str, type(None))


def run_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Flat name -> tensor: trained parameters, every new tensor and buffer, and the optimizer's state by parameter
    name."""
    trained = named_trained(model)
    state: dict[str, Tensor] = {
        f"{MODEL}{name}": tensor
        for name, tensor in model.state_dict().items()
        if name in trained or is_new_tensor(name)
    }
    known = 0
    for name, parameter in trained.items():
        known += parameter in optimizer.state
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"{OPTIMIZER}{name}.{key}"] = value
    if known != len(optimizer.state):
        raise RuntimeError(f"the optimizer holds {len(optimizer.state)} parameters but {known} of them have a name")
    return state


def plain_values(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Flat name -> what the optimizer keeps for a parameter that is no tensor; equal on all ranks.

    Raises:
        TypeError: it is nothing that JSON can hold.
    """
    values: dict[str, Any] = {}
    for name, parameter in named_trained(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                continue
            if not isinstance(value, _PLAIN):
                raise TypeError(f"{type(optimizer).__name__} keeps {key} as {type(value).__name__}: cannot be saved")
            values[f"{OPTIMIZER}{name}.{key}"] = value
    return values


def set_plain_values(model: nn.Module, optimizer: Optimizer, values: dict[str, Any]) -> None:
    """Give the optimizer back what :func:`plain_values` returned."""
    for name, parameter in named_trained(model).items():
        entry = optimizer.state.get(parameter, {})
        for key in entry:
            if (stored := f"{OPTIMIZER}{name}.{key}") in values:
                entry[key] = values[stored]


def named_trained(model: nn.Module) -> dict[str, Tensor]:
    """Name -> sharded parameter that is trained."""
    # After a forward without backward FSDP2 shows the gathered parameters, which the optimizer does not know.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_room(model: nn.Module, optimizer: Optimizer, stored: Collection[str]) -> None:
    """Make the optimizer allocate its state, which it does in its first step, for the parameters that have some in
    ``stored``: only it knows what kinds of tensors it keeps, and where. A gradient of 0 at a learning rate of 0 leaves
    the parameters as they are (those that are trained are about to be loaded anyway)."""
    names = {key.removeprefix(OPTIMIZER).rsplit(".", 1)[0] for key in stored}
    for name, parameter in named_trained(model).items():
        if name in names:
            parameter.grad = torch.zeros_like(parameter)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        set_rate(group, 0.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        set_rate(group, rate)


def random_state(rank: int) -> dict[str, Tensor]:
    """Name -> random state of this rank, uint8 on the CPU."""
    state = {f"rng.{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(rank: int, state: dict[str, Tensor]) -> None:
    """Restore what :func:`random_state` returned; what this machine does not have is left out."""
    torch.set_rng_state(state[f"rng.{rank}.cpu"])
    if f"rng.{rank}.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[f"rng.{rank}.cuda"])
