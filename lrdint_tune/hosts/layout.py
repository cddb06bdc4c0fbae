"""Documents and padding, read off the mask that transformers made."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lrdint_tune.attention.layout import Documents, Layout


def host_layout(mask: Tensor | None, *, causal: bool, num_queries: int, num_keys: int, device: torch.device) -> Layout:
    """The layout behind an attention call.

    In transformers a padding row sees the tokens before it; that it may not see itself tells it from the others.

    Args:
        mask: bool ``[B, N, M]``, True where attention is allowed, or None for all that ``causal`` allows.
        causal: False for encoders.
        num_queries, num_keys: ``N`` and ``M``; the queries are the last ``N`` positions.
        device: of the tensors.
    """
    offset = num_keys - num_queries
    if not causal:
        return BidirectionalLayout(mask, num_queries=num_queries, device=device)
    if mask is not None:
        mask = mask & mask.diagonal(offset, dim1=1, dim2=2)[..., None]
    return Layout(mask, None, num_queries=num_queries, offset=offset, device=device)


class BidirectionalLayout(Layout):
    """An encoder's: every sequence is one document, from its first token that is no padding to its last.

    Args:
        mask: bool ``[B, N, N]``, or None without padding.
        num_queries: ``N``.
        device: of the tensors.
    """

    causal = False

    def __init__(self, mask: Tensor | None, *, num_queries: int, device: torch.device) -> None:
        super().__init__(mask, None, num_queries=num_queries, device=device)

    @property
    def is_plain_causal(self) -> bool:
        return False

    @cached_property
    def counted(self) -> Tensor:
        if self._dense is None:
            return torch.ones(1, self.num_queries, dtype=torch.bool, device=self.device)
        return self._dense.diagonal(dim1=1, dim2=2)

    @cached_property
    def documents_of_rows(self) -> Documents:
        rows = torch.arange(self.num_queries, device=self.device)
        begin = self.counted.to(torch.uint8).argmax(1, keepdim=True)
        end = (rows + 1).expand_as(self.counted).masked_fill(~self.counted, 0).amax(1, keepdim=True)
        return Documents(torch.zeros_like(rows).expand_as(self.counted), begin, end)

    @cached_property
    def dense(self) -> Tensor:
        if self._dense is None:
            return torch.ones(1, 1, self.num_queries, self.num_queries, dtype=torch.bool, device=self.device)
        return super().dense
