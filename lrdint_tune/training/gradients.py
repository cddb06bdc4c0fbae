"""Norms of sharded gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lrdint_tune.models.decoder import is_new_tensor
from lrdint_tune.training.world import World


def total_norm(parameters: Iterable[nn.Parameter]) -> float:
    """L2 norm over all gradients, whole ones; a collective when they are sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())


def local_square(grad: Tensor) -> Tensor:
    """Sum of the squares of this rank's part of a gradient, 0-dim float32."""
    return (grad.to_local() if isinstance(grad, DTensor) else grad).float().square().sum()


def total_norm_of(squares: Mapping[str, Tensor], world: World) -> float:
    """L2 norm over all gradients from the :func:`local_square` of each; a collective."""
    total = torch.zeros((), device=world.device)
    for square in squares.values():
        total += square
    dist.all_reduce(total, group=world.mesh.get_group("shard"))
    return total.sqrt().item()


def adapter_norms(squares: Mapping[str, Tensor], num_layers: int, world: World) -> dict[str, float]:
    """``adapter_grad_norm/layers.N`` -> L2 norm of the gradients of the layer's new tensors; a collective.

    Args:
        squares: state-dict name of a parameter -> :func:`local_square` of its gradient; pretrained tensors may be
            among them.
    """
    sums = torch.zeros(num_layers, device=world.device)
    for name, square in squares.items():
        if is_new_tensor(name):
            sums[int(name.split(".")[1])] += square
    dist.all_reduce(sums, group=world.mesh.get_group("shard"))
    return {f"adapter_grad_norm/layers.{i}": value for i, value in enumerate(sums.sqrt().tolist())}
