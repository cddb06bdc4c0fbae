"""Tensor parallelism as the model sees it: where the processes that share a layer speak to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.tensor import DTensor, Partial, Replicate


@dataclass(frozen=True)
class TensorShard:
    """This process among those that share each layer.

    All of them hold the same activations between the parts that they share. What enters such a part goes through
    :meth:`enter`, what leaves it through :meth:`leave`: one all-reduce each, in the backward and in the forward pass.

    Attributes:
        rank, size: which of how many.
        group: the process group's name.
    """

    rank: int
    size: int
    group: GroupName

    def enter(self, t: Tensor) -> Tensor:
        """``t`` itself; its gradient is the sum of what the processes found."""
        return _Enter.apply(t, self.group)

    def leave(self, t: Tensor) -> Tensor:
        """The sum of the processes' parts; the gradient of a part is that of the sum."""
        return _Leave.apply(t, self.group)

    def rows(self, t: Tensor) -> Tensor:
        """This process's share of the rows of ``t``, a view."""
        return t.tensor_split(self.size)[self.rank]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: GroupName) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: GroupName) -> Tensor:
        return _sum(t, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _sum(t: Tensor, group: GroupName) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(t.contiguous(), "sum", group))


def whole(weight: Tensor, *, used_in_part: bool = False) -> Tensor:
    """A weight of which every process holds all, as a plain tensor.

    Args:
        used_in_part: the processes find different parts of its gradient, which FSDP2 then adds up once a step.
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.to_local(grad_placements=[Partial() if used_in_part else Replicate()])
