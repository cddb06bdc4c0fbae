"""How the processes of a run find each other; who does not come is named."""

from __future__ import annotations

import os
import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from lrdint_tune.errors import ConfigError, UnreachableError
from lrdint_tune.reachability import wait_for


def launched_as() -> tuple[int, int]:
    """Rank and number of processes that the launcher gave this one; without a launcher it is the only one.

    Raises:
        ConfigError: the launcher's environment variables are incomplete.
    """
    if "RANK" not in os.environ:
        # `tune run` without torchrun options, or plain python.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    rank, size = _environment("RANK"), _environment("WORLD_SIZE")
    if rank >= size:
        raise ConfigError(f"RANK={rank}: must be less than WORLD_SIZE={size}; these are set by the launcher")
    return rank, size


def join(backend: str, rank: int, size: int, timeout: timedelta) -> None:
    """Set up the process group of all ranks.

    Raises:
        ConfigError: the launcher's environment variables are incomplete.
        UnreachableError: not all processes came in ``timeout``, or they cannot connect to each other.
    """
    store = fresh_store(connect_store(rank, size, timeout), rank, size, timeout)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:  # DistError and gloo's own are RuntimeErrors
        raise cannot_talk(str(error).splitlines()[0], rank, size) from None


def cannot_talk(reason: str, rank: int, size: int) -> UnreachableError:
    """The error of a process that met the others at the store but does not get through to them."""
    return UnreachableError(
        f"the {size} processes met at {store_address()}, but rank {rank} on {socket.gethostname()} cannot connect "
        f"to the others directly ({reason}); set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface "
        "between the nodes, and check the firewall"
    )


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


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
