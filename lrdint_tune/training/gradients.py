"""Norms of sharded gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.world import World


def total_norm(parameters: Iterable[nn.Parameter]) -> float:
    """L2 norm over all gradients, whole ones; a collective when they are sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())


def adapter_norms(model: LlamaDecoder, world: World) -> dict[str, float]:
    """``adapter_grad_norm/layers.N`` -> L2 norm of the gradients of the layer's new tensors; a collective."""
    squares = torch.zeros(model.spec.num_layers, device=world.device)
    for name, parameter in model.adapter_parameters().items():
        if parameter.grad is not None:
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            squares[int(name.split(".")[1])] += grad.float().square().sum()
    dist.all_reduce(squares, group=world.mesh.get_group("shard"))
    return {f"adapter_grad_norm/layers.{i}": value for i, value in enumerate(squares.sqrt().tolist())}
