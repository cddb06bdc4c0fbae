"""Long sequences over several processes: each computes some of the rows, and asks the others for what its rows see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName


@dataclass(frozen=True)
class SequenceShard:
    """This process's part of every sequence: with ``N`` tokens, rows ``rank N / size`` to ``(rank + 1) N / size``.

    Queries stay where they are; keys and values are gathered. Contiguous parts: the last process's rows see the most
    keys, nearly twice the average.

    Attributes:
        rank, size: which part of how many.
        group: the process group's name.
    """

    rank: int
    size: int
    group: GroupName

    def take(self, t: Tensor, dim: int = -1) -> Tensor:
        """This process's part of a whole tensor along ``dim``, a view.

        Raises:
            ValueError: ``size`` does not divide that dimension.
        """
        if t.shape[dim] % self.size:
            raise ValueError(f"{t.shape[dim]} tokens cannot be shared by {self.size} context-parallel processes")
        length = t.shape[dim] // self.size
        return t.narrow(dim, self.rank * length, length)

    def gather(self, t: Tensor, dim: int) -> Tensor:
        """Everybody's parts one after another along ``dim``; the backward pass adds up what everybody asks of this
        part."""
        return _Gather.apply(t, dim, self.group)

    def sum(self, t: Tensor) -> Tensor:
        """Sum over the processes; no gradient."""
        return collectives.wait_tensor(collectives.all_reduce(t, "sum", self.group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t: Tensor, dim: int, group: GroupName) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return collectives.wait_tensor(collectives.all_gather_tensor(t.contiguous(), dim, group))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        part = collectives.reduce_scatter_tensor(grad.contiguous(), "sum", ctx.dim, ctx.group)
        return collectives.wait_tensor(part), None, None
