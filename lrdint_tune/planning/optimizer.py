"""What an optimizer holds: the real one, stepped on parameters without memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrdint_tune.errors import ConfigError
from lrdint_tune.planning.trace import Held, storage_bytes
from lrdint_tune.training.components import build


def measure_optimizer(section: Mapping[str, Any], groups: list[dict[str, Any]], device: str) -> tuple[int, int]:
    """Bytes of the state of one rank, and the most that a step holds beside it.

    Args:
        section: the config's ``optimizer``.
        groups: its parameter groups, of meta tensors.
        device: ``cpu`` or ``cuda``, where torch's optimizers take all parameters at once (``foreach``) by default.

    Raises:
        ConfigError: as building it does, or it cannot step without memory.
    """
    # Fused kernels hold nothing beside the state, and are refused on the meta device.
    options = {name: value for name, value in section.items() if name != "fused"}
    state, scratch = 0, 0
    for group in groups:
        # One of each kind: every tensor has a state of its own.
        kinds: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        for p in group["params"]:
            kinds.setdefault((p.shape, p.dtype), []).append(p)
        for (shape, dtype), members in kinds.items():
            optimizer = build("optimizer", options, [{**group, "params": [_with_gradient(shape, dtype)]}])
            of_one, held = _step(section, optimizer)
            state += of_one * len(members)
            scratch = max(scratch, held)
    if section.get("fused"):
        return state, 0
    optimizer = build(
        "optimizer", options, [{**g, "params": [_with_gradient(p.shape, p.dtype) for p in g["params"]]} for g in groups]
    )
    together = [group for group in optimizer.param_groups if group.get("foreach", False) is not False]
    if device == "cuda" and together:
        for group in together:
            group["foreach"] = True
        _, scratch = _step(section, optimizer)
    return state, scratch


def _with_gradient(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    return parameter


def _step(section: Mapping[str, Any], optimizer: Optimizer) -> tuple[int, int]:
    """Bytes of the state after a step, and the most that a second step holds beside it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()  # makes the state
            state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
            with Held([*parameters, *(p.grad for p in parameters if p.grad is not None), *state]) as held:
                optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"optimizer._component_={section['_component_']!r}: cannot be planned, its step needs values "
            f"({str(error).splitlines()[0]}); plan with torch.optim.AdamW"
        ) from error
    return storage_bytes(state), held.peak
