"""Which knobs make a run fit that does not: each is tried, in the order of what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lrdint_tune.errors import ConfigError
from lrdint_tune.planning.knobs import Knobs
from lrdint_tune.planning.plan import Plan, Planner
from lrdint_tune.training.config import TrainConfig

EIGHT_BIT = "torchao.optim.AdamW8bit"


@dataclass(frozen=True)
class Change:
    """A way to spend less memory.

    Attributes:
        overrides: for the command line, ``key=value``, or ``~key`` to remove one.
        cost: what it takes instead.
        knobs: with it.
    """

    overrides: tuple[str, ...]
    cost: str
    knobs: Knobs


@dataclass(frozen=True)
class Advice:
    """Overrides, what they cost, and the peak in bytes with them."""

    overrides: str
    cost: str
    peak: int
    fits: bool


def advise(planner: Planner, plan: Plan) -> list[Advice]:
    """For a plan that does not fit: every single change that makes it fit, the cheapest first; if there is none, one
    entry with the changes to make together, which may still not fit."""
    single = []
    for change in changes(planner, plan.knobs):
        tried = _try(planner, change)
        if tried is not None and tried.fits:
            single.append(Advice(" ".join(change.overrides), change.cost, tried.memory.total, True))
    return single or [_together(planner, plan)]


def _together(planner: Planner, plan: Plan) -> Advice:
    """Take one change after the other, each that lowers the peak, until it fits or none is left."""
    best, tried = plan, set()
    overrides: dict[str, str] = {}  # by key: a later change may set one again
    costs: dict[str, str] = {}
    found = True
    while found and not best.fits:
        found = False
        for change in changes(planner, best.knobs):
            if change.overrides in tried:
                continue
            tried.add(change.overrides)
            better = _try(planner, change)
            if better is not None and better.memory.total < best.memory.total:
                best, found = better, True
                overrides |= {override.split("=")[0]: override for override in change.overrides}
                costs[change.overrides[0].split("=")[0]] = change.cost
                break
    return Advice(" ".join(overrides.values()), "; ".join(costs.values()), best.memory.total, bool(best.fits))


def _try(planner: Planner, change: Change) -> Plan | None:
    try:
        return planner.evaluate(change.knobs)
    except ConfigError:  # heads that do not divide, say
        return None


def changes(planner: Planner, knobs: Knobs) -> Iterator[Change]:
    """Everything there is to turn from ``knobs``, the cheapest first."""
    cfg = planner.cfg
    yield from _checkpointing(cfg, knobs)
    yield from _more_shards(cfg, knobs)
    yield from _smaller_batches(cfg, knobs)
    yield from _optimizer(cfg, knobs)
    if not knobs.activation_offloading:
        yield Change(
            ("enable_activation_offloading=true", "enable_activation_checkpointing=true", "ac_mode=full", *_no_k(cfg)),
            "blocks' inputs travel to the CPU and back, every block is computed twice",
            replace(knobs, activation_offloading=True, checkpointing="full"),
        )
    if not knobs.nf4 and not {"attention", "mlp", "all"} & set(cfg.trainable):
        yield Change(("quantize_base=nf4",), "base weights of 4 bits", replace(knobs, nf4=True))
    yield from _shared_sequences(cfg, knobs, planner.target.network.gpus_per_node)
    if not knobs.cpu_offload:
        yield Change(
            ("fsdp_cpu_offload=true",),
            "parameters and gradients travel to the CPU, which updates them",
            replace(knobs, cpu_offload=True),
        )


def _checkpointing(cfg: TrainConfig, knobs: Knobs) -> Iterator[Change]:
    costs = {"selective": "everything but products is computed twice", "full": "every block is computed twice"}
    stronger = {"none": ("selective", "full"), "selective": ("full",), "every_k": ("full",), "full": ()}
    for mode in stronger[knobs.checkpointing]:
        yield Change(
            ("enable_activation_checkpointing=true", f"ac_mode={mode}", *_no_k(cfg)),
            costs[mode],
            replace(knobs, checkpointing=mode),
        )


def _more_shards(cfg: TrainConfig, knobs: Knobs) -> Iterator[Change]:
    if knobs.replicate > 1:
        yield Change(
            ("data_parallel_replicate_dim=1", *_rest(cfg)),
            "parameters are gathered from all ranks",
            replace(knobs, replicate=1, shard=knobs.replicate * knobs.shard),
        )
    if knobs.tensor > 1 and (reshaped := _reshaped(cfg, knobs, tensor=1)):
        yield Change(
            ("tensor_parallel_dim=1", *_rest(cfg)),
            "parameters are sharded instead, every rank has sequences of its own",
            reshaped,
        )


def _smaller_batches(cfg: TrainConfig, knobs: Knobs) -> Iterator[Change]:
    for batch in (b for b in range(knobs.batch_size // 2, 0, -1) if knobs.batch_size % b == 0):
        passes = knobs.passes * knobs.batch_size // batch
        again = () if cfg.global_batch_size else (f"gradient_accumulation_steps={passes}",)
        yield Change(
            (f"batch_size={batch}", *again),
            "more passes a step; between them every rank holds whole gradients",
            replace(knobs, batch_size=batch, passes=passes),
        )
    if knobs.passes > 1:
        rows = knobs.batch_size * knobs.data_parallel
        yield Change(
            (f"global_batch_size={rows}" if cfg.global_batch_size else "gradient_accumulation_steps=1",),
            "fewer tokens a step: another training",
            replace(knobs, passes=1),
        )


def _optimizer(cfg: TrainConfig, knobs: Knobs) -> Iterator[Change]:
    if str(knobs.optimizer["_component_"]).startswith("torch.optim.Adam"):
        own = [name for name in ("fused", "foreach") if name in knobs.optimizer]  # torch's
        options = {name: value for name, value in knobs.optimizer.items() if name not in own}
        yield Change(
            (f"optimizer._component_={EIGHT_BIT}", *(f"~optimizer.{name}" for name in own)),
            "moments in 8 bits",
            replace(knobs, optimizer={**options, "_component_": EIGHT_BIT}),
        )
    if cfg.clip_grad_norm is None and knobs.passes == 1 and not knobs.optimizer_in_bwd:
        yield Change(("optimizer_in_bwd=true",), "no clipping, one pass a step", replace(knobs, optimizer_in_bwd=True))


def _shared_sequences(cfg: TrainConfig, knobs: Knobs, gpus_per_node: int) -> Iterator[Change]:
    fewer = "" if cfg.global_batch_size else ", fewer sequences a step"
    for name, most, cost in (
        ("tensor", gpus_per_node, "all-reduces in every block that nothing hides"),
        ("context", 8, "keys and values are gathered in every block, the last rank has most of the attention"),
    ):
        if getattr(knobs, name) > 1:
            continue
        for ranks in (2, 4, 8):
            if ranks > most or (name == "context" and cfg.max_seq_len % ranks):
                continue
            if reshaped := _reshaped(cfg, knobs, **{name: ranks}):
                yield Change((f"{name}_parallel_dim={ranks}", *_rest(cfg)), cost + fewer, reshaped)


def _reshaped(cfg: TrainConfig, knobs: Knobs, *, tensor: int = 0, context: int = 0) -> Knobs | None:
    """Let other numbers of ranks share a sequence, and the shards be the rest; a global batch keeps its size. None if
    that does not divide."""
    changed = replace(knobs, tensor=tensor or knobs.tensor, context=context or knobs.context)
    ranks = knobs.shard * knobs.tensor * knobs.context
    shard, left = divmod(ranks, changed.tensor * changed.context)
    if left:
        return None
    passes = knobs.passes
    if cfg.global_batch_size:
        passes, left = divmod(knobs.passes * knobs.shard, shard)
    return None if left or not passes else replace(changed, shard=shard, passes=passes)


def _no_k(cfg: TrainConfig) -> tuple[str, ...]:
    """The override that removes the k of ``every_k``, where the config has one."""
    return () if cfg.ac_option is None else ("~ac_option",)


def _rest(cfg: TrainConfig) -> tuple[str, ...]:
    """The override that makes the shards the rest of the ranks, where the config has a number."""
    return () if cfg.data_parallel_shard_dim == -1 else ("data_parallel_shard_dim=-1",)
