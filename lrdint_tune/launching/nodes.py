"""How the nodes of a job find each other."""

from __future__ import annotations

import socket
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from lrdint_tune.launching.agent import say
from lrdint_tune.launching.options import DEFAULT_PORT
from lrdint_tune.reachability import listens, wait_for

JOIN_SECONDS = 600  # torch's default


def meet(config: LaunchConfig) -> RendezvousHandler:
    """torch's rendezvous, once something listens at the endpoint: torch itself gives up after a minute, and cannot be
    interrupted meanwhile.

    Raises:
        RendezvousError: nothing did in the time given for joining.
    """
    options: dict[str, Any] = dict(config.rdzv_configs)
    if config.rdzv_backend == "c10d" and config.max_nodes > 1 and options.get("store_type", "tcp") == "tcp":
        host, port = parse_rendezvous_endpoint(config.rdzv_endpoint, default_port=DEFAULT_PORT)
        is_host = options.get("is_host")
        if is_host is None and not _matches_machine_hostname(host):
            # torch compares names and the addresses of this machine's name, so it overlooks other interfaces.
            options["is_host"] = is_host = str(is_own_address(host) and not listens(host, port)).lower()
        if str(is_host).lower() in ("0", "false", "f", "n", "no"):
            try:
                wait_for(host, port, join_seconds(config), lambda: say(f"waiting for {host}:{port}"))
            except ConnectionError as error:
                raise RendezvousError(
                    f"--rdzv_endpoint={host}:{port}: {error}; does this command run on {host}, is the port open?"
                ) from None
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **options,
    )
    try:
        return get_rendezvous_handler(parameters)
    except RendezvousConnectionError:
        raise RendezvousError(
            f"{config.rdzv_endpoint} (--rdzv_endpoint): what listens there is not the store of this job; choose "
            "another port"
        ) from None


def join_seconds(config: LaunchConfig) -> int:
    return int(config.rdzv_configs.get("join_timeout", JOIN_SECONDS))


def is_own_address(host: str) -> bool:
    """Whether ``host`` is an address or name of this machine: only then can a socket be bound to it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as s:
            s.bind(address)
    except OSError:
        return False
    return True


def describe_loss(error: RendezvousError, config: LaunchConfig, handler: RendezvousHandler | None) -> str:
    """One line for nodes that did not meet (``handler`` None: not even the endpoint) or lost each other."""
    text = " ".join(str(error).split())
    if handler is None:
        return text
    if not isinstance(error, RendezvousTimeoutError):
        return f"the other nodes ended or cannot be reached at {config.rdzv_endpoint} any more ({text})"
    # torch's own message is empty. It has taken this node off the list already.
    state = handler._state_holder.state  # type: ignore[attr-defined]
    here = sorted(node.addr for node in {*state.participants, handler._this_node})  # type: ignore[attr-defined]
    return (
        f"{len(here)} of {config.min_nodes} nodes came to {config.rdzv_endpoint} in {join_seconds(config)} s: "
        f"{', '.join(here)}; start the others with the same --rdzv_endpoint and --rdzv_id={config.run_id}"
    )
