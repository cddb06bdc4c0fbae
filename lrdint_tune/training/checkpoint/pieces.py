"""What a rank writes of a tensor, cut into pieces: who loads it on other ranks reads only what it needs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PIECE_BYTES = 16 * 2**20


class PiecewiseSavePlanner(DefaultSavePlanner):
    """torch's plan with pieces of whole rows (dimension 0), each of at most 16 MiB unless a single row is larger.

    torch reads a stored item as a whole, whatever part of it a rank needs: four ranks that load what one has written
    would each hold every tensor. Quantised tensors stay whole; they cannot be cut anywhere.
    """

    def create_local_plan(self) -> SavePlan:
        self._wholes: dict[MetadataIndex, tuple[MetadataIndex, int, int]] = {}
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[piece for item in plan.items for piece in self._cut(item)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index not in self._wholes:
            return super().lookup_object(index)
        whole, start, rows = self._wholes[index]
        return super().lookup_object(whole).narrow(0, start, rows)

    def _cut(self, item: WriteItem) -> list[WriteItem]:
        data = item.tensor_data
        if data is None or not data.chunk.sizes or not _is_plain(self.state_dict[item.index.fqn]):
            return [item]
        offsets, sizes = data.chunk.offsets, data.chunk.sizes
        row_bytes = math.prod(sizes[1:]) * data.properties.dtype.itemsize
        step = max(1, PIECE_BYTES // max(row_bytes, 1))
        if sizes[0] <= step:
            return [item]
        pieces = []
        for start in range(0, sizes[0], step):
            rows = min(step, sizes[0] - start)
            chunk = ChunkStorageMetadata(torch.Size([offsets[0] + start, *offsets[1:]]), torch.Size([rows, *sizes[1:]]))
            index = dataclasses.replace(item.index, offset=chunk.offsets)
            self._wholes[index] = (item.index, start, rows)
            part = dataclasses.replace(data, chunk=chunk)
            pieces.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=part))
        return pieces


def _is_plain(tensor: Tensor) -> bool:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return not is_traceable_wrapper_subclass(local)
