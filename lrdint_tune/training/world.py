"""Processes, devices and the mesh: the part of a run that differs between a laptop and a cluster."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _resolve_process_group, _set_pg_timeout

from lrdint_tune.attention.sequence_shard import SequenceShard
from lrdint_tune.ending import in_time
from lrdint_tune.errors import ConfigError
from lrdint_tune.training.rendezvous import cannot_talk, join, launched_as

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        mesh: ``(replicate, shard, tensor)`` over all ranks. FSDP2 shards over the second dimension, which counts the
            context-parallel ranks too, and replicates over the first; tensor parallelism is over the third.
        context: None, or which part of every sequence this rank computes.
        data_rank, data_size: which rows of a batch it reads; ranks that share a sequence or a layer read the same.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    context: SequenceShard | None = None
    data_rank: int = 0
    data_size: int = 1
    _side_groups: dict[timedelta, dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)

    def side_group(self, timeout: timedelta) -> dist.ProcessGroup:
        """All ranks in a gloo group for what goes on beside the training. Runs that follow each other share it: a group
        keeps a connection to every rank until the process ends."""
        if timeout not in self._side_groups:
            self._side_groups[timeout] = dist.new_group(backend="gloo", timeout=timeout)
        return self._side_groups[timeout]

    @property
    def tensor_size(self) -> int:
        """How many ranks share each layer, and so compute the same losses."""
        return self.size // (self.data_size * self.context_size)

    @property
    def context_size(self) -> int:
        """How many ranks share each sequence."""
        return 1 if self.context is None else self.context.size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, action: Callable[[], _T]) -> _T:
        """Run ``action`` on rank 0 and give every rank its result or its ConfigError: nobody waits for one that failed.

        Every rank must call it. The result must be picklable.
        """
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [action()]
            except ConfigError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], ConfigError):
            raise outcome[0]
        return outcome[0]


class MeshShape(NamedTuple):
    """How many processes each kind of parallelism takes; their product is the number of processes."""

    replicate: int
    shard: int
    context: int = 1
    tensor: int = 1


def mesh_shape(world_size: int, replicate: int, shard: int, context: int = 1, tensor: int = 1) -> MeshShape:
    """Resolve ``data_parallel_replicate_dim x data_parallel_shard_dim x context_parallel_dim x tensor_parallel_dim``
    against the number of processes; a shard dimension of -1 is the rest.

    Raises:
        ConfigError: if the product is not the world size; the message shows the arithmetic.
    """
    others = {
        "data_parallel_replicate_dim": replicate,
        "context_parallel_dim": context,
        "tensor_parallel_dim": tensor,
    }
    taken = math.prod(others.values())
    if shard == -1:
        if world_size % taken:
            keys = [key for key, value in others.items() if value > 1]
            product = " x ".join(str(others[key]) for key in keys)
            raise ConfigError(
                f"{' x '.join(keys)}={product}: does not divide the {world_size} processes "
                f"({world_size} / {taken} = {world_size / taken:.2f}); start a multiple of {taken}"
            )
        shard = world_size // taken
    if taken * shard != world_size:
        names = (f"{replicate} (replicate)", f"{shard} (shard)", f"{context} (context)", f"{tensor} (tensor)")
        shown = names if context * tensor > 1 else names[:2]
        raise ConfigError(
            f"data_parallel_shard_dim={shard}: {' x '.join(shown)} = {taken * shard}, but "
            f"{world_size} processes were started; set it to -1 or start {taken * shard} processes"
        )
    return MeshShape(replicate, shard, context, tensor)


def resolve_device(name: str) -> torch.device:
    """The device of this process: ``auto`` takes CUDA where there is one.

    Raises:
        ConfigError: CUDA asked for but not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no CUDA device; set device=cpu or auto")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start_world(
    device_name: str,
    check: Callable[[torch.device], None] | None = None,
    /,
    *,
    replicate: int,
    shard: int,
    context: int = 1,
    tensor: int = 1,
    init_timeout_seconds: float = 300,
    timeout_minutes: float = 30.0,
) -> World:
    """Join the process group, or found one of a single process when no launcher set one up.

    CPU tensors always travel over gloo (checkpoints need it beside NCCL).

    Args:
        check: called once the processes can talk, before the meshes are made of them.
        init_timeout_seconds: for all processes to come, and then for ``check`` and for all groups to connect; if that
            takes longer the process ends as an UnreachableError would make it end.
        timeout_minutes: of a collective, afterwards.

    Raises:
        ConfigError: the mesh does not fit the number of processes, the device is not there, or the launcher's
            environment variables are incomplete.
        UnreachableError: not all processes came, or they cannot connect to each other.
    """
    rank, world_size = launched_as()
    shape = mesh_shape(world_size, replicate, shard, context, tensor)
    device = resolve_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        join(backend, rank, world_size, timedelta(seconds=init_timeout_seconds))
    # Messages between ranks begin here, with time limits that not every backend keeps; NCCL has none for connecting.
    late = cannot_talk(f"no answer in {init_timeout_seconds:.0f} s", rank, world_size)
    with in_time(init_timeout_seconds, late):
        if check is not None:
            check(device)
        world = make_world(device, shape)
        groups = [dist.group.WORLD, *world.mesh.get_all_groups()]
        if world.context is not None:
            groups.append(_resolve_process_group(world.context.group))
        try:
            _connect(groups, device)
        except RuntimeError as error:
            raise cannot_talk(str(error).splitlines()[0], rank, world_size) from None
    # Longer than any lost rank takes to be noticed: NCCL's own ten minutes would come before its name is known.
    for group in groups:
        _set_pg_timeout(timedelta(minutes=timeout_minutes), group)
    return world


def _connect(groups: Sequence[dist.ProcessGroup | None], device: torch.device) -> None:
    """NCCL connects the ranks of a group at its first collective, which would be somewhere in the first step."""
    for group in groups:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(torch.zeros(1, device=device), group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_world(device: torch.device, shape: MeshShape) -> World:
    """The meshes over the processes of the group. Ranks that share a layer are neighbours, then those that share a
    sequence: they talk most."""
    replicate, shard, context, tensor = shape
    mesh = init_device_mesh(
        device.type, (replicate, shard * context, tensor), mesh_dim_names=("replicate", "shard", "tensor")
    )
    part = None
    if context > 1:
        names = ("data", "context", "tensor")
        sequence = init_device_mesh(device.type, (replicate * shard, context, tensor), mesh_dim_names=names)["context"]
        part = SequenceShard(sequence.get_local_rank(), context, sequence.get_group().group_name)
    rank = dist.get_rank()
    return World(
        rank=rank,
        size=dist.get_world_size(),
        device=device,
        mesh=mesh,
        context=part,
        data_rank=rank // (context * tensor),
        data_size=replicate * shard,
    )


def end_world() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
