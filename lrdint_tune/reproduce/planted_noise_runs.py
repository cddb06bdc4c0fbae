"""Training on planted noise: which of the layer's tensors move, and for how long."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrdint_tune.adapters import LoRA, attach
from lrdint_tune.attention import METHODS, DifferentialSelfAttention
from lrdint_tune.attention.methods import method_options
from lrdint_tune.reproduce.planted_noise import (
    EMBED_DIM,
    Noise,
    Weights,
    build_layer,
    draw_weights,
    errors,
    oracles,
    second_map_resembles,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "output_proj")
HELD_OUT = 128  # sequences


@dataclass(frozen=True)
class Cell:
    """A way to remove noise.

    Attributes:
        method: of the registry.
        options: of the method, over its defaults.
        attention: also train q, k, v and output projections.
        lora_rank: also train LoRA of this rank on the q and k projections; 0 for none.
    """

    method: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    attention: bool = False
    lora_rank: int = 0


@dataclass(frozen=True)
class Schedule:
    """Adam; the learning rate falls to 0 along a cosine. The data are new at every step.

    Attributes:
        steps: optimizer steps; ``annealed`` λ get half of them for their annealing.
        batch: sequences a step.
        length: ``N``, tokens a sequence.
        lr: the highest learning rate, of every tensor.
    """

    steps: int = 300
    batch: int = 8
    length: int = 32
    lr: float = 1e-2


def run_cell(cell: Cell, noise: Noise, seed: int, schedule: Schedule) -> dict[str, Any]:
    """Train one cell on the noisy layer towards the clean layer's output, and measure what noise is left.

    The layer, its noise, the training data and the held-out inputs depend on the seed alone, so cells are paired.

    Returns:
        ``left``: see :func:`~lrdint_tune.reproduce.planted_noise.errors`, on held-out inputs; ``oracles`` and
        ``resembles``: see the functions there; ``trained``: numbers of
        parameters; ``lambda``: final λ of each head, where it is no function of the token; ``losses``: of the training,
        the squared output error over that of the untouched layer, the first and the mean of the last ten.
    """
    weights = draw_weights(noise, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)  # the method's random start
    clean, noisy = build_layer(weights, noisy=False), build_layer(weights, noisy=True)
    layer = _layer(cell, weights, schedule)
    trained = [p for p in layer.parameters() if p.requires_grad]
    held_out = _inputs(HELD_OUT, schedule.length, torch.Generator().manual_seed(10_000 + seed))
    with torch.no_grad():
        unit = float((noisy(held_out) - clean(held_out)).square().mean())
    losses = _train(layer, clean, unit, trained, schedule, torch.Generator().manual_seed(20_000 + seed))
    return {
        "left": errors(layer, clean, noisy, held_out),
        "oracles": oracles(clean, noisy, held_out),
        "resembles": second_map_resembles(layer, clean, noisy, held_out),
        "trained": sum(p.numel() for p in trained),
        "lambda": _lambda(layer, held_out),
        "losses": [losses[0], sum(losses[-10:]) / len(losses[-10:])],
        "cell": {**asdict(cell), "options": dict(cell.options)},
        "noise": asdict(noise),
        "seed": seed,
        "schedule": asdict(schedule),
    }


def _layer(cell: Cell, weights: Weights, schedule: Schedule) -> DifferentialSelfAttention:
    options = dict(cell.options)
    defaults = method_options(cell.method)
    if options.get("lam", defaults.get("lam")) == "annealed":
        options.setdefault("anneal_steps", max(1, schedule.steps // 2))
    if cell.method == "lmam":
        options.setdefault("n", schedule.length)
    layer = build_layer(weights, noisy=True, method=cell.method, **options)
    for name in PROJECTIONS if cell.attention else ():
        getattr(layer, name).requires_grad_(True)
    for name in ("q_proj", "k_proj") if cell.lora_rank else ():
        attach(getattr(layer, name), "lora", LoRA(EMBED_DIM, EMBED_DIM, rank=cell.lora_rank))
    return layer


def _train(
    layer: DifferentialSelfAttention,
    clean: DifferentialSelfAttention,
    unit: float,
    trained: list[torch.nn.Parameter],
    schedule: Schedule,
    generator: torch.Generator,
) -> list[float]:
    optimizer = torch.optim.Adam(trained, lr=schedule.lr, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / schedule.steps)))
    losses: list[float] = []
    for step in range(schedule.steps):
        x = _inputs(schedule.batch, schedule.length, generator)
        with torch.no_grad():
            ideal = clean(x)
        loss = (layer(x) - ideal).square().mean() / unit
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay.step()
        layer.method.advance_schedule(step + 1)
        losses.append(float(loss.detach()))
    return losses


def _inputs(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Independent normal tokens, ``[batch, length, D]``."""
    return torch.randn(batch, length, EMBED_DIM, generator=generator)


def _lambda(layer: DifferentialSelfAttention, x: Tensor) -> list[float] | None:
    form = getattr(layer.method, "lam", None)
    if form is None:
        return None
    with torch.no_grad():
        lam = form.lam(x)
    return lam.flatten().tolist() if lam.dim() == 3 else None


def default_cells() -> dict[str, Cell]:
    """Every method on a frozen base, LoRA at equal parameters, and the base's attention trained alone and with every
    method."""
    # 1/255 is made for longer training: the map would not move here.
    options: dict[str, dict[str, Any]] = {"lmam": {"scale": 1.0}}
    methods = [name for name in METHODS if name != "none"]
    cells = {name: Cell(name, options.get(name, {})) for name in methods}
    # daa and dex; diff and dint (but λ); diffq, diffk, diffv and difflora train as many parameters.
    cells |= {f"lora-{rank}": Cell(lora_rank=rank) for rank in (8, 12, 16)}
    cells["attention"] = Cell(attention=True)
    return cells | {f"{name}+attention": Cell(name, options.get(name, {}), attention=True) for name in methods}


# One setting changed at a time: of causal low-rank DINT, and the λ form of methods whose defaults differ in it.
ABLATIONS: dict[str, Cell] = {
    "dint scale-variance": Cell("dint", {"secondary_scale": "variance"}),
    "dint scale-standard": Cell("dint", {"secondary_scale": "standard"}),
    "dint rank-1": Cell("dint", {"rank": 1}),
    "dint rank-4": Cell("dint", {"rank": 4}),
    "dint rank-32": Cell("dint", {"rank": 32}),
    "dint lam-annealed": Cell("dint", {"lam": "annealed"}),
    "dint lam-exponential": Cell("dint", {"lam": "exponential"}),
    "dint lam-gated": Cell("dint", {"lam": "gated"}),
    "dint lam-sigmoid": Cell("dint", {"lam": "sigmoid"}),
    "dint lam-fixed-0.1": Cell("dint", {"lam": "fixed"}),
    "diff lam-annealed": Cell("diff", {"lam": "annealed"}),
    "daa lam-learned": Cell("daa", {"lam": "learned"}),
    "diffq lam-learned": Cell("diffq", {"lam": "learned"}),
}
