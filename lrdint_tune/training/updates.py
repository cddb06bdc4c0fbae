"""From gradients to new parameters: after the backward pass, or inside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.gradients import adapter_norms, local_square, total_norm, total_norm_of
from lrdint_tune.training.world import World


def build_updates(
    model: LlamaDecoder, optimizer: Optimizer, world: World, cfg: TrainConfig
) -> AfterBackward | InBackward:
    """What the config asks for: ``optimizer_in_bwd``, ``clip_grad_norm``."""
    if cfg.optimizer_in_bwd:
        return InBackward(model, optimizer, world)
    return AfterBackward(model, optimizer, world, cfg.clip_grad_norm)


class AfterBackward:
    """All gradients are kept until the backward pass is over, then clipped and used.

    Args:
        model: sharded.
        optimizer: of its trained parameters.
        clip: the L2 norm that all gradients together may have; None for any.
    """

    if_nonfinite = "no update was made"

    def __init__(self, model: LlamaDecoder, optimizer: Optimizer, world: World, clip: float | None) -> None:
        self.model, self.optimizer, self.world, self.clip = model, optimizer, world, clip
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def total_norm(self) -> float:
        """L2 norm of the step's gradients, before clipping; a collective."""
        return total_norm(self.trained)

    def adapter_norms(self) -> dict[str, float]:
        """See :func:`~lrdint_tune.training.gradients.adapter_norms`; a collective."""
        new = self.model.adapter_parameters()
        squares = {name: local_square(p.grad, self.world) for name, p in new.items() if p.grad is not None}
        return adapter_norms(squares, self.model.spec.num_layers, self.world)

    def finish(self, norm: float) -> None:
        """Update the parameters with gradients whose :meth:`total_norm` is ``norm``, and free them."""
        if self.clip is not None:
            whole = torch.tensor(norm, device=self.world.device)
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.clip, whole)
        with record_function("optimizer"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class InBackward:
    """Each parameter is updated as soon as its whole gradient is there, which is then freed: never are all of them in
    memory.

    FSDP2 runs the hooks of a sharded parameter after the reduce-scatter (and all-reduce) of its group. The optimizer
    is an ordinary one that sees one parameter at a time, so an update must not depend on other parameters; nor can
    gradients be clipped together or summed over passes.

    Args:
        model: sharded.
        optimizer: of its trained parameters; its state, groups and schedule stay as they are.
    """

    if_nonfinite = "the parameters were already updated with it (optimizer_in_bwd=true)"

    def __init__(self, model: LlamaDecoder, optimizer: Optimizer, world: World) -> None:
        self.model, self.optimizer, self.world = model, optimizer, world
        # By number: loading a state gives the optimizer new group dicts.
        group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.squares: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._update, name, group_of[parameter]))

    def _update(self, name: str, group: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.squares[name] = local_square(parameter.grad, self.world)
        with record_function("optimizer"), only(self.optimizer, group, parameter):
            self.optimizer.step()
        parameter.grad = None

    def total_norm(self) -> float:
        """L2 norm of the step's gradients; a collective."""
        return total_norm_of(self.squares, self.world)

    def adapter_norms(self) -> dict[str, float]:
        """See :func:`~lrdint_tune.training.gradients.adapter_norms`; a collective."""
        return adapter_norms(self.squares, self.model.spec.num_layers, self.world)

    def finish(self, norm: float) -> None:
        """The parameters are updated; forget the norms."""
        self.squares.clear()


@contextmanager
def only(optimizer: Optimizer, group: int, parameter: Tensor) -> Iterator[None]:
    """Let ``optimizer`` know of one parameter, of the group of that number: a step then does not look through all the
    others."""
    groups = optimizer.param_groups
    chosen = groups[group]
    parameters = chosen["params"]
    optimizer.param_groups, chosen["params"] = [chosen], [parameter]
    try:
        yield
    finally:
        optimizer.param_groups, chosen["params"] = groups, parameters
