"""The control: the pretrained attention, unchanged."""

from torch import Tensor

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.base import AttentionMethod
from lrdint_tune.attention.shape import AttentionShape


class NoMethod(AttentionMethod):
    """``O1 = softmax(q1 k1^T / sqrt(hd)) v``."""

    name = "none"

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()

    def forward(self, ctx: AttentionContext) -> Tensor:
        return ctx.attend(ctx.q, ctx.k, ctx.v)
