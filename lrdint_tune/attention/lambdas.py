"""How strongly the noise map is subtracted: the parameterisations of λ (methods.md 2).

A form is a module whose ``forward(x)`` returns λ ready to multiply attention outputs, broadcastable to ``[B, H, N,
hd]``. Parameters are float32 and one-dimensional (FSDP2 shards no 0-dim parameter); the trainer gives them their own
optimizer group without weight decay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrdint_tune.errors import ConfigError

DEFAULT_ANNEAL_STEPS = 1000


class LambdaForm(nn.Module, ABC):
    """Base of the λ forms.

    Args:
        num_lambdas: ``H`` (one per head) or 1 (one per layer).
        lam_init: the form's constant; its default stands in the subclass.
    """

    name: ClassVar[str]
    default_init: ClassVar[float]
    last: Tensor

    def __init__(self, num_lambdas: int, lam_init: float) -> None:
        super().__init__()
        self.num_lambdas = num_lambdas
        self.lam_init = lam_init

    @abstractmethod
    def reset_parameters(self) -> None:
        """Write the start values; called again after a meta-device module has been given memory."""

    def advance(self, step: int) -> None:  # noqa: B027  # most forms have no schedule
        """Tell the schedule that ``step`` optimizer steps are done. Only ``annealed`` has one."""

    @abstractmethod
    def lam(self) -> Tensor:
        """The current λ, float32 ``[H]`` or ``[1]``."""

    def forward(self, x: Tensor) -> Tensor:
        """λ as ``[H or 1, 1, 1]`` in ``x.dtype``; ``x`` ``[B, N, D]`` is there for forms that depend on the token.

        ``last`` keeps the value before it is rounded to ``x.dtype``, for diagnostics.
        """
        lam = self.lam()
        self.last = lam.detach()
        # A copy: FSDP2 warns of a module that returns a view of its parameter.
        return lam.view(-1, 1, 1).to(x.dtype, copy=True)

    @property
    def starts_at_zero(self) -> bool:
        """Whether λ is 0 before the first step, so that the pretrained function is unchanged."""
        return self.lam_init == 0


class Learned(LambdaForm):
    """``λ = p``, ``p`` starts at ``lam_init`` = 0 (the seeds' code)."""

    name = "learned"
    default_init = 0.0

    def __init__(self, num_lambdas: int, lam_init: float) -> None:
        super().__init__(num_lambdas, lam_init)
        self.value = nn.Parameter(torch.empty(num_lambdas, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.value, self.lam_init)

    def lam(self) -> Tensor:
        return self.value


class Annealed(LambdaForm):
    """``λ(t) = (1 - α) (t/T) λ_init + α p`` with ``α = min(1, t/T)``, ``p`` starting at 0 (seed 002 eq. 3).

    ``t`` is the number of optimizer steps done, held in the buffer ``step`` (float32 ``[1]``, saved with the model);
    ``T`` is ``anneal_steps``. At ``t >= T`` λ is ``p`` alone.
    """

    name = "annealed"
    default_init = 0.8
    step: Tensor

    def __init__(self, num_lambdas: int, lam_init: float, anneal_steps: int) -> None:
        super().__init__(num_lambdas, lam_init)
        self.anneal_steps = anneal_steps
        self.value = nn.Parameter(torch.empty(num_lambdas, dtype=torch.float32))
        self.register_buffer("step", torch.empty(1, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.value)
        nn.init.zeros_(self.step)

    @property
    def starts_at_zero(self) -> bool:
        return True

    def advance(self, step: int) -> None:
        self.step.fill_(step)

    def lam(self) -> Tensor:
        ramp = self.step / self.anneal_steps
        alpha = ramp.clamp(max=1.0)
        return (1 - alpha) * ramp * self.lam_init + alpha * self.value


class Fixed(LambdaForm):
    """``λ = lam_init``, a constant (DiffLoRA's stable variant: 0.1). Not the identity at step 0 unless ``lam_init`` is
    0."""

    name = "fixed"
    default_init = 0.1
    constant: Tensor

    def __init__(self, num_lambdas: int, lam_init: float) -> None:
        super().__init__(1, lam_init)
        # Not saved: the constant is an option of the model, not something it learned.
        self.register_buffer("constant", torch.empty(1, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.constant, self.lam_init)

    def lam(self) -> Tensor:
        return self.constant


LAMBDA_FORMS: dict[str, type[LambdaForm]] = {form.name: form for form in (Learned, Annealed, Fixed)}
LAMBDA_SHARING = ("head", "layer")


def build_lambda(
    form: str, num_heads: int, *, lam_init: float | None, lam_sharing: str, anneal_steps: int | None
) -> LambdaForm:
    """Build a λ form from a method's options.

    Args:
        form: ``learned | annealed | fixed``.
        num_heads: ``H``.
        lam_init: the form's constant; None takes the form's default (0, 0.8, 0.1).
        lam_sharing: ``head`` (one λ per head) or ``layer`` (one per layer).
        anneal_steps: ``T`` in optimizer steps, ``annealed`` only; None takes 1000.

    Raises:
        ConfigError: unknown form or sharing, ``anneal_steps`` < 1, or an option that the form does not use.
    """
    if form not in LAMBDA_FORMS:
        raise ConfigError(f"lam={form!r}: unknown λ parameterisation; choose one of {', '.join(LAMBDA_FORMS)}")
    if lam_sharing not in LAMBDA_SHARING:
        raise ConfigError(f"lam_sharing={lam_sharing!r}: unknown; choose one of {', '.join(LAMBDA_SHARING)}")
    cls = LAMBDA_FORMS[form]
    if lam_init is not None and (isinstance(lam_init, bool) or not isinstance(lam_init, (int, float))):
        raise ConfigError(f"lam_init={lam_init!r}: must be a number, or null for the default of lam={form}")
    if anneal_steps is not None and (isinstance(anneal_steps, bool) or not isinstance(anneal_steps, int)):
        raise ConfigError(f"anneal_steps={anneal_steps!r}: must be a whole number of optimizer steps")
    init = cls.default_init if lam_init is None else float(lam_init)
    count = num_heads if lam_sharing == "head" else 1
    if cls is Annealed:
        steps = DEFAULT_ANNEAL_STEPS if anneal_steps is None else anneal_steps
        if steps < 1:
            raise ConfigError(f"anneal_steps={steps}: must be at least 1 optimizer step")
        return Annealed(count, init, steps)
    if anneal_steps is not None:
        raise ConfigError(
            f"anneal_steps={anneal_steps}: has no effect with lam={form!r}; remove it or set lam=annealed"
        )
    return cls(count, init)
