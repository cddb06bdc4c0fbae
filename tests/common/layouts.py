"""The ways a batch can be laid out, each as the arguments of the fast code and as the reference's explicit rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from lrdint_tune.attention import DocumentMask
from tests.common.reference import Rows

BATCH, LENGTH = 2, 12
DOCUMENTS = [[5, 1, 6], [3, 9]]
"""Documents of each packed row: one of a single token, and different boundaries in the two rows."""
PADDING = [4, 0]
"""Padded positions of each row, left or right."""


@dataclass(frozen=True)
class Case:
    """`mask` and `input_pos` go to the fast code, `rows` to the reference."""

    rows: Rows
    mask: Any = None
    input_pos: Tensor | None = None


def _causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(BATCH, LENGTH, LENGTH)


def _positions() -> Tensor:
    return torch.arange(LENGTH).expand(BATCH, LENGTH)


def _packed_rows() -> Rows:
    documents = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in DOCUMENTS])
    positions = torch.tensor([[p for n in row for p in range(n)] for row in DOCUMENTS])
    allowed = _causal() & (documents[:, :, None] == documents[:, None, :])
    return Rows(allowed, documents, positions)


def _padded_rows(side: str, pads_see_themselves: bool = False) -> Rows:
    """Padding on one side; padded keys are hidden from every row, padded rows see nothing (or only themselves)."""
    index, padding = _positions(), torch.tensor(PADDING)[:, None]
    real = index >= padding if side == "left" else index < LENGTH - padding
    allowed = _causal() & real[:, :, None] & real[:, None, :]
    if pads_see_themselves:
        allowed = allowed | torch.eye(LENGTH, dtype=torch.bool)
    positions = (real.cumsum(-1) - 1).clamp(min=0) if side == "left" else index
    # Every padded row is a document of its own.
    documents = torch.where(real, torch.zeros_like(index), index + 1)
    return Rows(allowed, documents, positions)


def _block(allowed: Tensor) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: allowed[b, i, j], BATCH, None, LENGTH, LENGTH, device="cpu")


def layout_case(name: str) -> Case:
    """One of LAYOUTS or BLOCK_LAYOUTS."""
    if name == "causal":
        return Case(Rows(_causal(), torch.zeros(BATCH, LENGTH, dtype=torch.int64), _positions()))
    if name == "causal_dense":
        return Case(Rows(_causal(), torch.zeros(BATCH, LENGTH, dtype=torch.int64), _positions()), mask=_causal())
    if name.startswith("packed"):
        rows = _packed_rows()
        if name == "packed":
            return Case(rows, mask=DocumentMask(DOCUMENTS), input_pos=rows.positions)
        if name == "packed_no_positions":  # RoPE sees only differences of positions, so these need not restart
            return Case(rows, mask=DocumentMask(DOCUMENTS))
        if name == "packed_dense":
            return Case(rows, mask=rows.allowed, input_pos=rows.positions)
        if name == "packed_dense_no_positions":
            return Case(rows, mask=rows.allowed)
        if name == "packed_block":
            return Case(rows, mask=_block(rows.allowed), input_pos=rows.positions)
    if name in ("left_padded", "right_padded"):
        rows = _padded_rows(name.split("_")[0])
        return Case(rows, mask=rows.allowed, input_pos=rows.positions)
    if name in ("left_padded_block", "right_padded_block"):
        rows = _padded_rows(name.split("_")[0])
        return Case(rows, mask=_block(rows.allowed), input_pos=rows.positions)
    if name == "hole":  # a padded position inside the document: it sees nothing and nothing sees it
        real = _positions() != 5
        rows = Rows(
            _causal() & real[:, :, None] & real[:, None, :], torch.zeros_like(_positions()), real.cumsum(-1) - 1
        )
        return Case(rows, mask=rows.allowed, input_pos=rows.positions)
    if name == "left_padded_torchtune":  # torchtune's padding masks leave the diagonal open on padded rows
        rows = _padded_rows("left", pads_see_themselves=True)
        return Case(rows, mask=rows.allowed, input_pos=rows.positions)
    raise ValueError(name)


LAYOUTS = [
    "causal",
    "causal_dense",
    "packed",
    "packed_no_positions",
    "packed_dense",
    "packed_dense_no_positions",
    "left_padded",
    "right_padded",
    "left_padded_torchtune",
    "hole",
]
BLOCK_LAYOUTS = ["packed_block", "left_padded_block", "right_padded_block"]
"""BlockMasks, which only the flex backend takes."""
