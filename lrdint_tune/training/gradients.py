"""Norms of gradients and scalars of methods whose parts lie on several ranks."""

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
            grad, copies = parameter.grad, 1
            if isinstance(grad, DTensor):
                if world.tensor_size > 1 and grad.placements[-1].is_replicate():
                    copies = world.tensor_size
                grad = grad.to_local()
            squares[int(name.split(".")[1])] += grad.float().square().sum() / copies
    for dim in ("shard", "tensor"):
        dist.all_reduce(squares, group=world.mesh.get_group(dim))
    return {f"adapter_grad_norm/layers.{i}": value for i, value in enumerate(squares.sqrt().tolist())}


def diagnostics(model: LlamaDecoder, world: World) -> dict[str, float]:
    """The methods' scalars on this rank's sequences, over the heads of all ranks that share them; a collective."""
    own = model.diagnostics()
    if not own:
        return {}
    values = torch.stack([value.float() for value in own.values()])
    if world.tensor_size > 1:
        parts = [torch.empty_like(values) for _ in range(world.tensor_size)]
        dist.all_gather(parts, values, group=world.mesh.get_group("tensor"))
        every = torch.stack(parts)
        lowest, highest, mean = every.amin(0), every.amax(0), every.mean(0)
        chosen = [{"lambda_min": lowest, "lambda_max": highest}.get(tag.split("/")[0], mean) for tag in own]
        values = torch.stack([of[i] for i, of in enumerate(chosen)])
    return dict(zip(own, values.tolist(), strict=True))
