"""Norms of gradients and scalars of methods whose parts lie on several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lrdint_tune.models.decoder import LlamaDecoder, is_new_tensor
from lrdint_tune.training.pulse import agreed
from lrdint_tune.training.world import World


def total_norm(parameters: Iterable[nn.Parameter]) -> float:
    """L2 norm over all gradients, whole ones; a collective when they are sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float(agreed(norm.full_tensor() if isinstance(norm, DTensor) else norm))


def local_square(grad: Tensor, world: World) -> Tensor:
    """Sum of the squares of this rank's part of a gradient, 0-dim float32; of one that the ranks of a tensor group all
    hold, its part of that sum."""
    if not isinstance(grad, DTensor):
        return grad.float().square().sum()
    copies = world.tensor_size if grad.placements[-1].is_replicate() else 1
    return grad.to_local().float().square().sum() / copies


def total_norm_of(squares: Mapping[str, Tensor], world: World) -> float:
    """L2 norm over all gradients from the :func:`local_square` of each; a collective."""
    total = torch.zeros((), device=world.device)
    for square in squares.values():
        total += square
    return float(agreed(_over_ranks(total, world).sqrt()))


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
    norms = agreed(_over_ranks(sums, world).sqrt())
    return {f"adapter_grad_norm/layers.{i}": norm for i, norm in enumerate(norms)}


def _over_ranks(squares: Tensor, world: World) -> Tensor:
    """The sum over the ranks that hold different parts, in place."""
    for dim in ("shard", "tensor"):
        dist.all_reduce(squares, group=world.mesh.get_group(dim))
    return squares


def diagnostics(model: LlamaDecoder, world: World) -> dict[str, float]:
    """The methods' scalars on this rank's rows; of tensor-parallel ranks the lowest, the highest, or the mean of what
    they have. A collective."""
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
    return dict(zip(own, agreed(values), strict=True))
