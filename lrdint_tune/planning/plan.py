"""One config, one set of knobs, one number of ranks: memory, FLOPs, communication and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lrdint_tune.models.spec import ModelSpec
from lrdint_tune.planning.communication import Traffic, step_traffic
from lrdint_tune.planning.knobs import Knobs
from lrdint_tune.planning.memory import Memory, estimate_memory
from lrdint_tune.planning.optimizer import measure_optimizer
from lrdint_tune.planning.parts import Parts, measure_parts
from lrdint_tune.planning.skeleton import Skeleton, build_skeleton, compute_dtype, fake_world, local_model
from lrdint_tune.planning.timing import Flops, Network, Timing, count_flops, estimate_time
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.hardware import Hardware
from lrdint_tune.training.memory import check_passes
from lrdint_tune.training.parallelize import check_parallel


@dataclass(frozen=True)
class Target:
    """What is planned for.

    Attributes:
        world_size: ranks.
        hardware: of each; None for CPU processes, of which no figures are known.
        network: between them.
        attainable: share of the peak that products reach, with everything between them.
        usable: share of the device's memory that a run may fill; the rest is for NCCL, kernels and fragments.
    """

    world_size: int
    hardware: Hardware | None
    network: Network
    attainable: float
    usable: float

    @property
    def device(self) -> str:
        return "cpu" if self.hardware is None else "cuda"

    @property
    def memory_limit(self) -> int | None:
        """Bytes; None where unknown."""
        return None if self.hardware is None else int(self.usable * self.hardware.memory_gib * 2**30)


CPU_RANKS = Network(gpus_per_node=1, network_gb_per_s=1.0)  # never read: without figures no time is estimated


@dataclass(frozen=True)
class Plan:
    """The estimate. ``timing`` is None without figures of the hardware."""

    knobs: Knobs
    spec: ModelSpec
    num_parameters: int
    num_trained: int
    seq_len: int
    memory: Memory
    memory_limit: int | None
    flops: Flops
    traffic: Sequence[Traffic]
    timing: Timing | None

    @property
    def fits(self) -> bool | None:
        """None where nobody knows."""
        return None if self.memory_limit is None else self.memory.total <= self.memory_limit


class Planner:
    """Evaluates knobs for one config and target, doing again only what they change; use it in a :func:`fake_world`.

    Raises:
        ConfigError: the config's model cannot be built, or its mesh does not fit the ranks.
    """

    def __init__(self, cfg: TrainConfig, target: Target) -> None:
        self.cfg, self.target = cfg, target
        self.knobs = Knobs.from_config(cfg, target.world_size)
        self.model = local_model(cfg, tensor=1)
        self.spec = self.model.spec
        self._skeletons: dict[tuple, Skeleton] = {}
        self._parts: dict[tuple, Parts] = {}
        self._optimizers: dict[tuple, tuple[int, int]] = {}

    def evaluate(self, knobs: Knobs) -> Plan:
        """Raises ConfigError for knobs that the training would refuse."""
        cfg, target = self.cfg, self.target
        asked = replace(knobs.config(cfg), compile=False)  # this machine need not have the compiler
        check_passes(asked, knobs.passes, knobs.data_parallel)
        check_parallel(self.model, asked, torch.device(target.device), knobs.fsdp)
        mesh = (knobs.replicate, knobs.fsdp, knobs.tensor)
        key: tuple = (*mesh, knobs.nf4, knobs.fp8_all_gather)
        if key not in self._skeletons:
            self._skeletons[key] = build_skeleton(cfg, knobs)
        skeleton = self._skeletons[key]
        key = (knobs.tensor, knobs.context, knobs.batch_size, knobs.checkpointing)
        if key not in self._parts:
            self._parts[key] = measure_parts(cfg, self.spec, knobs, target.device)
        parts = self._parts[key]
        key = (*mesh, tuple(sorted(knobs.optimizer.items())))
        if key not in self._optimizers:
            self._optimizers[key] = measure_optimizer(knobs.optimizer, skeleton.parameter_groups, target.device)
        state, scratch = self._optimizers[key]

        memory = estimate_memory(
            skeleton, parts, (state, scratch), knobs, num_layers=self.spec.num_layers, device=target.device
        )
        seq_len = cfg.max_seq_len
        flops = count_flops(self.model, knobs, seq_len)
        element = compute_dtype(cfg).itemsize
        traffic = step_traffic(skeleton.groups, self.model, knobs, seq_len=seq_len, element=element)
        timing = None
        if target.hardware is not None:
            updated = 4 * sum(group.trained for group in skeleton.groups.values()) // knobs.fsdp
            timing = estimate_time(
                flops,
                traffic,
                knobs,
                target.hardware,
                target.network,
                seq_len=seq_len,
                dtype=cfg.dtype,
                attainable=target.attainable,
                update_bytes=3 * updated + 2 * state,  # parameters and state are read and written, gradients read
            )
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return Plan(
            knobs=knobs,
            spec=self.spec,
            num_parameters=sum(n for n, _ in sizes),
            num_trained=sum(n for n, trained in sizes if trained),
            seq_len=seq_len,
            memory=memory,
            memory_limit=target.memory_limit,
            flops=flops,
            traffic=traffic,
            timing=timing,
        )


def plan(cfg: TrainConfig, target: Target) -> Plan:
    """The estimate for ``cfg`` as it stands.

    Raises:
        ConfigError: the config cannot be planned for these ranks, or this process is one of several.
    """
    with fake_world(target.world_size):
        planner = Planner(cfg, target)
        return planner.evaluate(planner.knobs)
