"""What a method is: one module that holds the new tensors, and one short ``forward`` that is the formula."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrdint_tune.attention.context import AttentionContext
from lrdint_tune.attention.lambdas import LambdaForm
from lrdint_tune.errors import ConfigError


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one attention layer: ``D``, ``H``, ``K``, ``hd``."""

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class AttentionMethod(nn.Module, ABC):
    """Base of all methods. A subclass's keyword-only constructor arguments are its options.

    Attributes:
        name: the registry's and the config's name.
        cached_streams: names of tensors that cached decoding must keep beside ``k`` and ``v``.
        num_maps: how many softmax maps one forward computes.
        leaks_future: True for a variant that lets future tokens reach the past; generation and export refuse it.
        diagnostics: None, or, when enabled, scalars of the last forward.
    """

    name: ClassVar[str]
    cached_streams: ClassVar[tuple[str, ...]] = ()
    num_maps: ClassVar[int] = 1
    leaks_future: bool = False
    lam: LambdaForm

    def __init__(self) -> None:
        super().__init__()
        self.diagnostics: dict[str, Tensor] | None = None

    @abstractmethod
    def forward(self, ctx: AttentionContext) -> Tensor:
        """The attention output before ``output_proj``, ``[B, H, N, hd]``."""

    def reset_parameters(self) -> None:
        """Initialise every new tensor; called again after a meta-device module has been given memory."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]  # every child of a method has one

    def advance_schedule(self, step: int) -> None:
        """Set the λ schedule to ``step`` optimizer steps done."""
        for child in self.children():
            if isinstance(child, LambdaForm):
                child.advance(step)

    @property
    def starts_as_identity(self) -> bool:
        """Whether the first forward is the pretrained model's."""
        return all(child.starts_at_zero for child in self.children() if isinstance(child, LambdaForm))

    def observe(self, o1: Tensor, o2: Tensor) -> None:
        """Keep λ (mean, min, max over heads) and ``||O2|| / ||O1||`` of this forward, if diagnostics are enabled."""
        if self.diagnostics is None:
            return
        with torch.no_grad():
            lam = self.lam.last
            self.diagnostics = {
                "lambda_mean": lam.mean(),
                "lambda_min": lam.min(),
                "lambda_max": lam.max(),
                "o2_o1_ratio": o2.float().norm() / o1.float().norm(),
            }


def scale_multiplier(option: str | float, head_dim: int) -> float:
    """The multiplier of ``q2 k2^T``, that is ``1/sqrt(d2)`` (methods.md 1.3).

    ``seed``: ``d2 = hd/81`` as printed in seed 001; ``variance``: ``d2 = hd/9``, which the seed's own argument gives
    with ``nn.Linear``'s initialisation; ``standard``: ``d2 = hd``; a positive number is the multiplier itself.

    Raises:
        ConfigError: for anything else.
    """
    divisors = {"seed": 81.0, "variance": 9.0, "standard": 1.0}
    if isinstance(option, str) and option in divisors:
        return (divisors[option] / head_dim) ** 0.5
    if isinstance(option, (int, float)) and not isinstance(option, bool) and 0 < option < math.inf:
        return float(option)
    raise ConfigError(f"secondary_scale={option!r}: choose seed, variance, standard or a positive number")
