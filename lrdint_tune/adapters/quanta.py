"""QuanTA: a high-rank matrix made of small tensors on pairs of axes (Chen et al. 2024, arXiv:2406.00132)."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrdint_tune.adapters.base import LinearAdapter, at_least_float32
from lrdint_tune.errors import ConfigError


class QuanTA(LinearAdapter):
    """``y = W x + (T - T_start) x`` with ``T = Π T_mn``, one factor for each pair of axes ``m < n`` of ``x`` reshaped
    to ``[d1, ..., dN]``: ``(T_mn x)[.. a .. b ..] = Σ_cd T_mn[a, b, c, d] x[.. c .. d ..]``. Factors act in the order
    of the published code, last axes first: for N = 4 the pairs are 34, 24, 14, 23, 13, 12.

    ``T_start`` is the identity, where the published code draws it at random: then the frozen copy that is subtracted is
    ``x`` itself and need not be kept. What is stored is ``E_mn = T_mn - 1``, ``tensors.{m}_{n}`` with axes counted from
    0, shape ``[dm, dn, dm, dn]``, zeros at the start: weight decay then pulls towards the pretrained function, and
    ``T x - x`` is summed up factor by factor instead of being a difference of two large numbers, which bf16 would
    drown. Every tensor has a gradient at the first step.

    A linear layer of other sizes than ``Π d``: ``x`` is padded with zeros to it, and the update cropped, or padded with
    zeros, to ``out_features``.

    Args:
        in_features, out_features: of the adapted linear layer.
        dims: ``d1, ..., dN``; seed 004 takes 16-8-8-4 for 4096 and 16-8-8-5 for 5120.

    Raises:
        ConfigError: fewer than two axes, an axis smaller than 2, or ``Π d < in_features``: the published code ignores
            the features beyond ``Π d``.
    """

    name = "quanta"

    def __init__(self, in_features: int, out_features: int, *, dims: Sequence[int] = (16, 8, 8, 4)) -> None:
        super().__init__(in_features, out_features)
        if not isinstance(dims, (list, tuple)) or not 2 <= len(dims) <= len(string.ascii_lowercase):
            raise ConfigError(f"adapters.quanta.dims={dims!r}: must be a list of at least 2 sizes, e.g. [16, 8, 8, 4]")
        if any(isinstance(d, bool) or not isinstance(d, int) or d < 2 for d in dims):
            raise ConfigError(f"adapters.quanta.dims={list(dims)}: every size must be an integer of at least 2")
        self.dims = tuple(dims)
        self.total = math.prod(dims)
        if self.total < in_features:
            raise ConfigError(
                f"adapters.quanta.dims={list(dims)}: their product {self.total} is smaller than the {in_features} "
                "inputs of a target module; make it at least as large, or leave that module out"
            )
        n = len(dims)
        pairs = [(i, j) for j in reversed(range(n)) for i in reversed(range(j))]
        # In the order in which they act, which nn.ParameterDict does not keep.
        self.equations = {f"{i}_{j}": _equation(i, j, n) for i, j in pairs}
        self.tensors = nn.ParameterDict(
            {f"{i}_{j}": nn.Parameter(torch.empty(dims[i], dims[j], dims[i], dims[j])) for i, j in pairs}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for tensor in self.tensors.values():
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        x = F.pad(x, (0, self.total - self.in_features)).unflatten(-1, self.dims)
        update = torch.zeros_like(x)  # (T_k ... T_1 - 1) x
        for pair, equation in self.equations.items():
            update = update + torch.einsum(equation, x + update, self.tensors[pair].to(x.dtype))
        return F.pad(update.flatten(-len(self.dims)), (0, self.out_features - self.total))  # negative: crops

    def delta_weight(self) -> Tensor:
        tensor = next(iter(self.tensors.values()))
        eye = torch.eye(self.in_features, dtype=at_least_float32(tensor.dtype), device=tensor.device)
        return self(eye).T

    @property
    def products_per_token(self) -> int:
        return sum(tensor.shape[0] * tensor.shape[1] * self.total for tensor in self.tensors.values())


def _equation(i: int, j: int, n: int) -> str:
    """einsum of a state and the tensor on axes ``i`` and ``j``, e.g. ``...abcd,CDcd->...abCD``."""
    axes = string.ascii_lowercase[:n]
    a, b = axes[i], axes[j]
    out = axes.replace(a, a.upper()).replace(b, b.upper())
    return f"...{axes},{a.upper()}{b.upper()}{a}{b}->...{out}"
