"""What a method is: one module that holds the new tensors, and one short ``forward`` that is the formula."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.lambdas import DEFAULT_ANNEAL_STEPS, LAMBDA_FORMS, Annealed, LambdaForm, build_lambda
from lrdint_tune.attention.layout import Layout
from lrdint_tune.attention.shape import AttentionShape
from lrdint_tune.errors import ConfigError
from lrdint_tune.options import choice

log = logging.getLogger(__name__)

COMBINATIONS = ("subtract", "add")
NOT_OBSERVED = -1.0  # no ratio of norms


class AttentionMethod(nn.Module, ABC):
    """Base of all methods. A subclass's keyword-only constructor arguments are its options.

    Attributes:
        name: the registry's and the config's name.
        cached_streams: names of tensors that cached decoding must keep beside ``k`` and ``v``.
        head_dims: every parameter of the method's own (of a child that has no ``head_dims`` too) with its dimension
            that counts heads, or None for one that all heads share: how tensor parallelism splits it.
        num_maps: how many softmax maps one forward computes, a map of fewer query heads as that fraction.
        rotary_dims: the dimensions of the method's tensors, by their names in it, that are in RoPE order: whoever
            converts weights between Meta and Hugging Face order must reorder them.
        needs_document_ends: True for a variant that must know where the padding behind a sequence begins.
        cache_refusal: None, or why there can be no KV cache.
        context_parallel_refusal: None, or why no process can compute its part of a sequence.
        caution: None, or what whoever reads the losses of this variant must know; logged at the start of a run.
        biases_logits: True for a variant that attends with a bias on the logits.
    """

    name: ClassVar[str]
    cached_streams: tuple[str, ...] = ()
    head_dims: Mapping[str, int | None] = {}
    num_maps: float = 1
    rotary_dims: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    needs_document_ends: bool = False
    cache_refusal: str | None = None
    context_parallel_refusal: str | None = None
    caution: str | None = None
    biases_logits: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._observed: Tensor | None = None  # float32 [1]

    @classmethod
    def leaks_future(cls, options: Mapping[str, Any]) -> bool:
        """Whether these options make a variant that lets future tokens reach the past; export refuses it."""
        return False

    @classmethod
    def full_options(cls, shape: AttentionShape, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options``, which hold every default, with what a null stands for, as far as it does not depend on the
        layer."""
        return dict(options)

    @abstractmethod
    def forward(self, ctx: AttentionContext) -> Tensor:
        """The attention output before ``output_proj``, ``[B, H, N, hd]``. The first map it attends with is ``A1``."""

    def attention_map(self, ctx: AttentionContext) -> Tensor:
        """The map ``M`` of ``out = M v``, for a context whose ``attend`` returns maps
        (:mod:`~lrdint_tune.attention.probe`): the same formula, so :meth:`forward` itself. A method that acts on
        values or features says here what is left of it without them."""
        return self(ctx)

    def prepare(self, layout: Layout) -> None:  # noqa: B027  # most methods need no more than every layout has
        """Derive from ``layout``, once for all layers of a forward and outside of what is compiled, what
        :meth:`forward` reads of it and no other method does."""

    def reset_parameters(self) -> None:
        """Initialise every new tensor; called again after a meta-device module has been given memory."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]  # every child of a method has one

    def advance_schedule(self, step: int) -> None:
        """Set the λ schedule to ``step`` optimizer steps done."""
        for form in self._lambda_forms():
            form.advance(step)

    def _lambda_forms(self) -> list[LambdaForm]:
        return [child for child in self.children() if isinstance(child, LambdaForm)]

    def differs_at_start(self) -> list[str]:
        """Why the first forward is not the pretrained model's, option by option; empty if it is."""
        forms = [form for form in self._lambda_forms() if not form.starts_at_zero]
        return [f"λ is not 0 at the start with lam={form.name}" for form in forms]

    def products_per_token(self, seq_len: int) -> float:
        """Multiplications per token of a forward pass of ``seq_len`` tokens, beyond the pretrained projections and the
        softmax maps: by default one for each element of the new matrices."""
        return sum(p.numel() for p in self.parameters() if p.dim() >= 2)

    def tensor_parallel_refusal(self, size: int) -> str | None:
        """Why ``size`` processes cannot share the heads, or None. Only asked where ``size`` divides ``H`` and ``K``."""
        return None

    # A method whose start depends on the data (which heads to act on) looks at some batches first.

    @property
    def needs_calibration(self) -> bool:
        """Whether :meth:`start_calibration`, forwards and :meth:`finish_calibration` should come before training."""
        return False

    def start_calibration(self) -> Tensor:
        """Make the following forwards collect statistics; returns the tensor in which they are summed, which the
        caller may add up over processes."""
        raise RuntimeError(f"method {self.name!r} needs no calibration")

    def finish_calibration(self) -> None:
        """Act on what was collected."""
        raise RuntimeError(f"method {self.name!r} needs no calibration")

    # Written into tensors that are there before the forward: a compiled or checkpointed block may do that, but not set
    # attributes.

    def enable_diagnostics(self, enabled: bool = True) -> None:
        """Make the following forwards keep (or no longer keep) the scalars that :meth:`diagnostics` returns."""
        device = next((p.device for p in self.parameters()), None)
        self._observed = torch.full((1,), NOT_OBSERVED, device=device) if enabled else None
        for form in self._lambda_forms():
            form.observed = torch.zeros(3, device=device) if enabled else None

    def observe(self, signal: Tensor, noise: Tensor) -> None:
        """Keep ``||O2|| / ||O1||`` of this forward, if diagnostics are enabled."""
        if self._observed is not None:
            with torch.no_grad():
                self._observed.copy_(noise.float().norm() / signal.float().norm())

    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars (float32) of the last forward since they were enabled: ``||O2|| / ||O1||`` and λ over heads; empty if
        there was none that observed any."""
        if self._observed is None or self._observed.item() == NOT_OBSERVED:
            return {}
        values = {"o2_o1_ratio": self._observed[0].clone()}
        for form in self._lambda_forms():
            assert form.observed is not None
            names = ("lambda_mean", "lambda_min", "lambda_max")
            values |= dict(zip(names, form.observed.clone().unbind(), strict=True))
        return values


class DifferentialMethod(AttentionMethod):
    """Base of the methods that subtract λ times something.

    Attributes:
        add_mirrors: whether ``combine: add`` is nothing but the other sign of λ.

    Args:
        shape: the layer's sizes.
        lam, lam_init, lam_sharing, anneal_steps: the λ form, see :func:`~lrdint_tune.attention.lambdas.build_lambda`.
        combine: ``subtract``, or ``add`` for the control that adds the same new term instead. With a λ that starts at 0
            and is free to take either sign (``learned``, ``gated``) that would be the same training mirrored, so it is
            refused.
        lam_heads: how many heads a λ per head is for; None takes ``H``. Not an option.

    Raises:
        ConfigError: for a bad option value.
    """

    add_mirrors: ClassVar[bool] = True

    def __init__(
        self,
        shape: AttentionShape,
        lam_heads: int | None = None,
        *,
        lam: str = "learned",
        lam_init: float | None = None,
        lam_sharing: str | None = None,
        anneal_steps: int | None = None,
        combine: str = "subtract",
    ) -> None:
        super().__init__()
        self.sign = -1 if choice("combine", combine, COMBINATIONS) == "subtract" else 1
        self.lam = build_lambda(
            lam,
            shape,
            num_heads=lam_heads or shape.num_heads,
            lam_init=lam_init,
            lam_sharing=lam_sharing,
            anneal_steps=anneal_steps,
        )
        if self.sign > 0 and self.add_mirrors and self.lam.is_symmetric:
            raise ConfigError(
                f"combine='add': with lam={lam!r}, which starts at 0, it is the mirror of subtract; use another lam"
            )

    @classmethod
    def full_options(cls, shape: AttentionShape, options: Mapping[str, Any]) -> dict[str, Any]:
        form = LAMBDA_FORMS[options["lam"]]
        filled = dict(options)
        if filled["lam_init"] is None:
            filled["lam_init"] = form.default_init
        if filled["lam_sharing"] is None and form.sharings:
            filled["lam_sharing"] = form.sharings[0]
        if form is Annealed and filled["anneal_steps"] is None:
            filled["anneal_steps"] = DEFAULT_ANNEAL_STEPS
        return filled

    def difference(self, o1: Tensor, o2: Tensor, lam: Tensor) -> Tensor:
        """``O1 - λ O2`` (``combine: add``: ``O1 + λ O2``)."""
        self.observe(o1, o2)
        return torch.addcmul(o1, lam, o2, value=self.sign)


@cache
def warn_once(message: str) -> None:
    """Every layer would say it."""
    log.warning(message)


def identity_matrices(parameter: Tensor) -> None:
    """Fill ``[..., d, d]`` with identity matrices, in place."""
    with torch.no_grad():
        parameter.copy_(torch.eye(parameter.shape[-1], dtype=parameter.dtype, device=parameter.device))
