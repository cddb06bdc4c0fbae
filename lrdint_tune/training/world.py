"""Processes, devices and the mesh: the part of a run that differs between a laptop and a cluster."""

from __future__ import annotations

import math
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from lrdint_tune.attention.sequence_shard import SequenceShard
from lrdint_tune.errors import ConfigError, UnreachableError
from lrdint_tune.reachability import wait_for

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
        init_timeout_seconds: for all processes to come and to connect to each other.
        timeout_minutes: of a collective, afterwards.

    Raises:
        ConfigError: the mesh does not fit the number of processes, the device is not there, or the launcher's
            environment variables are incomplete.
        UnreachableError: not all processes came, or they cannot connect to each other.
    """
    if "RANK" not in os.environ:
        # `tune run` without torchrun options, or plain python.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    rank, world_size = _environment("RANK"), _environment("WORLD_SIZE")
    if rank >= world_size:
        raise ConfigError(f"RANK={rank}: must be less than WORLD_SIZE={world_size}; these are set by the launcher")
    shape = mesh_shape(world_size, replicate, shard, context, tensor)
    device = resolve_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        _init_process_group(backend, rank, world_size, timedelta(seconds=init_timeout_seconds))
        _set_pg_timeout(timedelta(minutes=timeout_minutes))
    if check is not None:
        check(device)
    return make_world(device, shape)


def _init_process_group(backend: str, rank: int, size: int, timeout: timedelta) -> None:
    store = fresh_store(connect_store(rank, size, timeout), rank, size, timeout)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:  # DistError and gloo's own are RuntimeErrors
        raise UnreachableError(
            f"the {size} processes met at {store_address()}, but rank {rank} on {socket.gethostname()} cannot connect "
            f"to the others directly ({str(error).splitlines()[0]}); set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to "
            "the network interface between the nodes, and check the firewall"
        ) from None


def store_address() -> str:
    """``host:port`` of the store through which the processes find each other."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def connect_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The launcher's store, or where it has none, that of rank 0 at ``MASTER_ADDR:MASTER_PORT``.

    Raises:
        ConfigError: the variables are not set.
        UnreachableError: nothing listens there; or on rank 0, the port is taken.
    """
    port, host = _environment("MASTER_PORT"), os.environ.get("MASTER_ADDR")
    if not host:
        raise ConfigError("MASTER_ADDR: not set, but RANK is; set it to the host of rank 0, or use a launcher")
    founds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not founds:  # torch prints a page for each attempt
            wait_for(host, port, timeout.total_seconds())
        return dist.TCPStore(host, port, size, founds, timeout, wait_for_workers=False, multi_tenant=True)
    except (ConnectionError, RuntimeError) as error:
        what = "rank 0 cannot listen there" if founds else f"rank {rank} of {size} finds nobody there"
        raise UnreachableError(
            f"MASTER_ADDR:MASTER_PORT={host}:{port}: {what} ({str(error).splitlines()[0]}); is it the address of the "
            "first node, does that one run, is the port open?"
        ) from None


def _environment(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise ConfigError(f"{name}={value!r}: must be a number when RANK is set; use a launcher such as torchrun")
    return int(value)


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


def fresh_store(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A part of the store that nobody has written to before, once all ranks are there.

    With ``--max-restarts`` torchrun (2.13) keeps its store, and what the dead processes left in it: the new ones then
    wait for ever for connections to the old addresses. The number of restarts cannot tell attempts apart, since the
    nodes of a job count them separately. So rank 0 draws a name, and answers everybody who asks for it under a key
    that cannot be old. At the end it tells them that all are there, or who is not.

    Args:
        store: shared by all ranks.
        timeout: for all ranks to be there.

    Raises:
        UnreachableError: they were not; names those missing, and the hosts of the others.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"question/{rank}", own)
        try:
            store.wait([f"answer/{own}"], timeout)
            name = store.get(f"answer/{own}").decode()
            store.set(f"{name}/here/{rank}", socket.gethostname())
            store.wait([f"{name}/missing"], timeout + timedelta(seconds=10))
            missing_text = store.get(f"{name}/missing").decode()
        except RuntimeError:
            raise UnreachableError(
                f"rank 0 of {size} did not come to {store_address()} in {timeout.total_seconds():.0f} s, or left "
                f"(seen from rank {rank} on {socket.gethostname()})"
            ) from None
        if missing_text:
            raise UnreachableError(missing_text)
        return dist.PrefixStore(name, store)
    missing = _call_roll(store, size, own, time.monotonic() + timeout.total_seconds())
    text = ""
    if missing:
        came = sorted({store.get(f"{own}/here/{r}").decode() for r in range(1, size) if r not in missing})
        text = (
            f"{len(missing)} of {size} processes did not come to {store_address()} in {timeout.total_seconds():.0f} s: "
            f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, sorted(missing)[:8]))}"
            f"{', ...' if len(missing) > 8 else ''}; here are rank 0 on {socket.gethostname()} and processes on "
            f"{', '.join(came[:8]) or 'no other host'}{', ...' if len(came) > 8 else ''}"
        )
    store.set(f"{own}/missing", text)
    if text:
        time.sleep(1)  # the store may be this process's: the others have to read that
        raise UnreachableError(text)
    return dist.PrefixStore(own, store)


def _call_roll(store: dist.Store, size: int, name: str, end: float) -> set[int]:
    """Give every rank the name; returns those that did not come."""
    missing = set(range(1, size))
    while missing and time.monotonic() < end:
        for other in list(missing):
            # The question may be a dead process's, then the one who matters has yet to ask.
            if store.check([f"question/{other}"]):
                store.set(f"answer/{store.get(f'question/{other}').decode()}", name)
            if store.check([f"{name}/here/{other}"]):
                missing.remove(other)
        time.sleep(0.02)
    return missing


def end_world() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
