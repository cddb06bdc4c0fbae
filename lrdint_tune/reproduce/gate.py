"""A control for λ of each token: the gate alone, without a second map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods import METHODS
from lrdint_tune.attention.methods.base import DifferentialMethod
from lrdint_tune.attention.shape import AttentionShape


class Gate(DifferentialMethod):
    """``out = (1 - λ) O1``: what ``lam: gated`` can do to each head's output when there is nothing to subtract.

    Args:
        shape: the layer's sizes.
        options: those of :class:`~lrdint_tune.attention.methods.base.DifferentialMethod`.
    """

    name = "gate"

    def __init__(self, shape: AttentionShape, *, lam: str = "gated", **options: Any) -> None:
        super().__init__(shape, lam=lam, **options)

    def forward(self, ctx: AttentionContext) -> Tensor:
        o1 = ctx.attend(ctx.q, ctx.k, ctx.v)
        return self.difference(o1, o1, self.lam(ctx.x))


@contextmanager
def registered() -> Iterator[None]:
    """``method: gate`` in configs, inside this context only: it is a control, not one of the package's methods."""
    METHODS[Gate.name] = Gate
    try:
        yield
    finally:
        METHODS.pop(Gate.name, None)
