"""DINT: DIFF plus the integral term that restores the row sums (seeds 000, 001)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.methods.diff import Diff
from lrdint_tune.attention.shape import AttentionShape
from lrdint_tune.errors import ConfigError
from lrdint_tune.options import choice, flag

INTEGRALS = ("causal", "sequence")


class Dint(Diff):
    """``out = (A1 - λ A2 + λ A3) v = O1 + λ (mean(O1) - O2)`` (docs/methods.md).

    ``integral: causal`` (default) takes for ``A3`` the mean over the rows up to and including the current one, which
    is the seeds' formula read on the prefix. ``integral: sequence`` is the formula as printed, the mean over ALL rows:
    it lets row ``i`` attend to later keys, with weights computed from later queries. It exists to measure that leak
    and is refused unless ``allow_future_leak`` is set; generation and export refuse it in any case.

    Args:
        shape: the layer's sizes.
        integral: ``causal | sequence``.
        allow_future_leak: must be True for ``integral: sequence``.
        options: those of :class:`~lrdint_tune.attention.methods.diff.Diff`. ``combine: add`` changes the sign of ``λ
            A2`` alone, not that of the integral.

    Raises:
        ConfigError: for a bad option value, or ``integral: sequence`` without ``allow_future_leak: true``.
    """

    name = "dint"
    add_mirrors = False

    def __init__(
        self, shape: AttentionShape, *, integral: str = "causal", allow_future_leak: bool = False, **options: Any
    ) -> None:
        leaks = choice("integral", integral, INTEGRALS) == "sequence"
        if flag("allow_future_leak", allow_future_leak) and not leaks:
            raise ConfigError("allow_future_leak=True: has no effect with integral='causal'; remove it")
        if leaks and not allow_future_leak:
            raise ConfigError(
                "integral='sequence': averages over future rows, so future tokens reach the past and the loss is not a "
                "language-model loss; use integral=causal, or set allow_future_leak=true to measure the leak"
            )
        super().__init__(shape, **options)
        self.literal = leaks
        if leaks:
            self.caution = (
                "integral=sequence: future tokens reach the past. Training loss and ordinary validation loss are NOT "
                "language-model losses, and nothing will be exported; this run measures the leak."
            )
            self.context_parallel_refusal = (
                "integral='sequence': is not there for context_parallel_dim > 1; measure the leak on whole sequences"
            )
            self.cache_refusal = (
                "integral='sequence': generation is refused, the model reads future tokens; train with integral=causal"
            )

    @classmethod
    def leaks_future(cls, options: Mapping[str, Any]) -> bool:
        return options.get("integral") == "sequence"

    def combined(self, ctx: AttentionContext) -> Tensor:
        o1, o2 = ctx.attend(ctx.q, ctx.k, ctx.v), self.noise(ctx, ctx.k)
        lam = self.lam(ctx.x)
        self.observe(o1, o2)
        if self.sign > 0:
            o2 = -o2
        if self.literal:
            return o1 + lam * (ctx.document_mean(o1) - o2)
        return ctx.integral(o1, o2, lam)
