"""How strongly the noise map is subtracted: the parameterisations of λ (docs/methods.md, λ).

A form is a module whose ``forward(x)`` returns λ ready to multiply attention outputs, broadcastable to ``[B, H, N,
hd]``. Parameters are float32 and have at least one dimension (FSDP2 shards no 0-dim parameter); the trainer gives them
their own optimizer group without weight decay.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrdint_tune.attention.shape import AttentionShape
from lrdint_tune.errors import ConfigError
from lrdint_tune.options import number

DEFAULT_ANNEAL_STEPS = 1000


class LambdaForm(nn.Module, ABC):
    """Base of the λ forms.

    Args:
        shape: the layer.
        count: how many λ: one per head, or 1 for the layer.
        lam_init: the form's constant; None takes ``default_init``.

    Attributes:
        lam_init: ``λ_init``; NaN where the formula has none.
        default_init: the constant if none is given; None where it depends on the layer or there is none.
        has_constant: whether there is a ``λ_init`` in the formula.
        sharings: which ``lam_sharing`` the form takes, its default first.
        observed: None, or float32 ``[3]`` that each forward fills with λ's mean, minimum and maximum, before it is
            rounded to the activations' dtype.
    """

    name: ClassVar[str]
    default_init: ClassVar[float | None] = None
    has_constant: ClassVar[bool] = True
    sharings: ClassVar[tuple[str, ...]] = ("head", "layer")

    def __init__(self, shape: AttentionShape, count: int, lam_init: float | None) -> None:
        super().__init__()
        self.observed: Tensor | None = None
        self.shape = shape
        self.count = count
        init = self.default_init if lam_init is None else lam_init
        self.lam_init = math.nan if init is None else init

    @abstractmethod
    def reset_parameters(self) -> None:
        """Write the start values; called again after a meta-device module has been given memory."""

    def advance(self, step: int) -> None:  # noqa: B027  # most forms have no schedule
        """Tell the schedule that ``step`` optimizer steps are done. Only ``annealed`` has one."""

    @abstractmethod
    def lam(self, x: Tensor) -> Tensor:
        """The current λ, float32 ``[count, 1, 1]`` or ``[B, count, N, 1]``."""

    def forward(self, x: Tensor) -> Tensor:
        """λ as ``[count, 1, 1]``, or ``[B, count, N, 1]`` where it depends on the token, in ``x.dtype``; ``x`` ``[B, N,
        D]``."""
        lam = self.lam(x)
        if self.observed is not None:
            with torch.no_grad():
                self.observed.copy_(torch.stack([lam.mean(), lam.min(), lam.max()]))
        # A copy: FSDP2 warns of a module that returns a view of its parameter.
        return lam.to(x.dtype, copy=True)

    @property
    def head_dims(self) -> dict[str, int | None]:
        """Its parameters, with the dimension that counts heads: the first, or None for one λ of all heads."""
        return {name: 0 if self.count > 1 else None for name, _ in self.named_parameters()}

    @property
    def starts_at_zero(self) -> bool:
        """Whether λ is 0 before the first step, so that the pretrained function is unchanged."""
        return False

    @property
    def is_symmetric(self) -> bool:
        """Whether training finds -λ as it finds λ, so that adding is subtracting mirrored."""
        return False


class Learned(LambdaForm):
    """``λ = p``, ``p`` starts at ``lam_init`` = 0 (the seeds' code). Parameter ``value`` ``[count]``."""

    name = "learned"
    default_init = 0.0

    def __init__(self, shape: AttentionShape, count: int, lam_init: float | None) -> None:
        super().__init__(shape, count, lam_init)
        self.value = nn.Parameter(torch.empty(count, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.value, self.lam_init)

    def lam(self, x: Tensor) -> Tensor:
        return self.value.view(-1, 1, 1)

    @property
    def starts_at_zero(self) -> bool:
        return self.lam_init == 0

    @property
    def is_symmetric(self) -> bool:
        return self.starts_at_zero


class Annealed(LambdaForm):
    """``λ(t) = (1 - α) (t/T) λ_init + α p`` with ``α = min(1, t/T)``, ``p`` starting at 0 (seed 002 eq. 3).

    ``t`` is the number of optimizer steps done, held in the buffer ``step`` (float32 ``[1]``, saved with the model);
    ``T`` is ``anneal_steps``. At ``t >= T`` λ is ``p`` alone. Parameter ``value`` ``[count]``.
    """

    name = "annealed"
    default_init = 0.8
    step: Tensor

    def __init__(
        self, shape: AttentionShape, count: int, lam_init: float | None, anneal_steps: int = DEFAULT_ANNEAL_STEPS
    ) -> None:
        super().__init__(shape, count, lam_init)
        self.anneal_steps = anneal_steps
        self.value = nn.Parameter(torch.empty(count, dtype=torch.float32))
        self.register_buffer("step", torch.empty(1, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.value)
        nn.init.zeros_(self.step)

    @property
    def starts_at_zero(self) -> bool:
        return True

    @property
    def is_symmetric(self) -> bool:
        return self.lam_init == 0

    def advance(self, step: int) -> None:
        self.step.fill_(step)

    def lam(self, x: Tensor) -> Tensor:
        ramp = self.step / self.anneal_steps
        alpha = ramp.clamp(max=1.0)
        return ((1 - alpha) * ramp * self.lam_init + alpha * self.value).view(-1, 1, 1)


class Exponential(LambdaForm):
    """``λ = exp(a1·b1) - exp(a2·b2) + λ_init`` (DIFF; seed 004 eq. 4), ``λ_init = 0.8 - 0.6 exp(-0.3 l)`` in layer
    ``l``.

    Parameters ``a1, b1, a2, b2`` ``[count * hd]``, N(0, 0.1²). λ starts near ``λ_init`` and never exactly at 0.
    """

    name = "exponential"
    sharings = ("layer", "head")

    def __init__(self, shape: AttentionShape, count: int, lam_init: float | None) -> None:
        super().__init__(shape, count, 0.8 - 0.6 * math.exp(-0.3 * shape.layer_index) if lam_init is None else lam_init)
        self.a1, self.b1, self.a2, self.b2 = (
            nn.Parameter(torch.empty(count * shape.head_dim, dtype=torch.float32)) for _ in range(4)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for vector in self.parameters():
            nn.init.normal_(vector, std=0.1)

    def lam(self, x: Tensor) -> Tensor:
        a1, b1, a2, b2 = (vector.view(-1, self.shape.head_dim) for vector in self.parameters())
        lam = (a1 * b1).sum(-1).exp() - (a2 * b2).sum(-1).exp() + self.lam_init
        return lam.view(-1, 1, 1)


class PerToken(LambdaForm):
    """``λ = f(x W_λ)``, one per token. Parameter ``weight`` ``[count, D]``."""

    has_constant = False

    def __init__(self, shape: AttentionShape, count: int, lam_init: float | None) -> None:
        super().__init__(shape, count, lam_init)
        self.weight = nn.Parameter(torch.empty(count, shape.embed_dim, dtype=torch.float32))
        self.reset_parameters()

    def lam(self, x: Tensor) -> Tensor:
        logits = F.linear(x.to(self.weight.dtype), self.weight)  # [B, N, count]
        return self.squash(logits).transpose(1, 2).unsqueeze(-1)

    @staticmethod
    @abstractmethod
    def squash(logits: Tensor) -> Tensor:
        """``f``, element by element."""


class Sigmoid(PerToken):
    """``λ = sigmoid(x W_λ)`` (DIFF V2): between 0 and 1, about a half at the start. ``W_λ`` is initialised as
    ``nn.Linear``."""

    name = "sigmoid"

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.shape.embed_dim)
        nn.init.uniform_(self.weight, -bound, bound)

    @staticmethod
    def squash(logits: Tensor) -> Tensor:
        return logits.sigmoid()


class Gated(PerToken):
    """``λ = tanh(x W_λ)`` with ``W_λ = 0`` at the start: ``sigmoid``'s λ of each token for a model that starts as the
    pretrained one (this project's). Between -1 and 1."""

    name = "gated"

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    @staticmethod
    def squash(logits: Tensor) -> Tensor:
        return logits.tanh()

    @property
    def starts_at_zero(self) -> bool:
        return True

    @property
    def is_symmetric(self) -> bool:
        return True


class Fixed(LambdaForm):
    """``λ = lam_init``, a constant (DiffLoRA's stable variant: 0.1). Not the identity at step 0 unless ``lam_init`` is
    0, and then the noise branch stays asleep: a control."""

    name = "fixed"
    default_init = 0.1
    sharings = ()

    def reset_parameters(self) -> None:
        """There are none: the constant is an option of the model, not something it learned."""

    def lam(self, x: Tensor) -> Tensor:
        return torch.full((1, 1, 1), self.lam_init, dtype=torch.float32, device=x.device)

    @property
    def starts_at_zero(self) -> bool:
        return self.lam_init == 0


LAMBDA_FORMS: dict[str, type[LambdaForm]] = {
    form.name: form for form in (Learned, Annealed, Exponential, Sigmoid, Gated, Fixed)
}


def build_lambda(
    form: str,
    shape: AttentionShape,
    *,
    num_heads: int,
    lam_init: float | None,
    lam_sharing: str | None,
    anneal_steps: int | None,
) -> LambdaForm:
    """Build a λ form from a method's options.

    Args:
        form: ``learned | annealed | exponential | sigmoid | gated | fixed``.
        shape: the layer.
        num_heads: how many heads a λ per head is for (``H``, or ``K`` where λ acts on values).
        lam_init: the form's constant; None takes the form's default (0, 0.8, by layer, none, none,
            0.1).
        lam_sharing: ``head`` (one λ per head) or ``layer`` (one per layer); None takes the form's default, ``head``
            (``exponential``: ``layer``).
        anneal_steps: ``T`` in optimizer steps, ``annealed`` only; None takes 1000.

    Raises:
        ConfigError: unknown form or sharing, ``anneal_steps`` < 1, or an option that the form does not use.
    """
    if form not in list(LAMBDA_FORMS):
        raise ConfigError(f"lam={form!r}: unknown λ parameterisation; choose one of {', '.join(LAMBDA_FORMS)}")
    cls = LAMBDA_FORMS[form]
    if lam_sharing is not None and lam_sharing not in cls.sharings:
        raise ConfigError(
            f"lam_sharing={lam_sharing!r}: unknown; choose one of {', '.join(cls.sharings)}"
            if cls.sharings
            else f"lam_sharing={lam_sharing!r}: has no effect with lam={form!r}; remove it"
        )
    if lam_init is not None:
        number("lam_init", lam_init, hint=f", or null for the default of lam={form}")
        if not cls.has_constant:
            raise ConfigError(
                f"lam_init={lam_init!r}: lam={form!r} has no such constant; remove it, or set lam=learned"
            )
        lam_init = float(lam_init)
    sharing = lam_sharing or (cls.sharings[0] if cls.sharings else "layer")
    count = num_heads if sharing == "head" else 1
    if anneal_steps is None:
        return cls(shape, count, lam_init)
    if isinstance(anneal_steps, bool) or not isinstance(anneal_steps, int):
        raise ConfigError(f"anneal_steps={anneal_steps!r}: must be a whole number of optimizer steps")
    if anneal_steps < 1:
        raise ConfigError(f"anneal_steps={anneal_steps}: must be at least 1 optimizer step")
    if cls is not Annealed:
        raise ConfigError(
            f"anneal_steps={anneal_steps}: has no effect with lam={form!r}; remove it or set lam=annealed"
        )
    return Annealed(shape, count, lam_init, anneal_steps)
