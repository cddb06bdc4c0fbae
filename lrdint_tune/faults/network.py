"""Two hosts on one machine: network namespaces with an address and a host name each, joined by one cable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lrdint_tune.faults.tools import run_tool

PORT = 29500  # inside the namespaces nobody else has it


@dataclass(frozen=True)
class Host:
    """One end of the cable.

    Attributes:
        namespace: its name for ``ip netns``.
        device: its network device.
    """

    name: str
    address: str
    namespace: str
    device: str
    hosts_file: Path

    def command(self, command: list[str]) -> list[str]:
        """``command``, run on this host. Every step replaces the process, so that its id is the command's own."""
        # `ip netns exec` has a mount namespace of its own: /etc/hosts is another one for this process only.
        script = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        uts = ["unshare", "--uts", "sh", "-c", script, "sh", str(self.hosts_file), self.name]
        return ["ip", "netns", "exec", self.namespace, *uts, *command]


@dataclass(frozen=True)
class Network:
    """Two hosts and the cable between them."""

    hosts: tuple[Host, Host]

    def cut(self) -> None:
        """Pull the plug: connections stay open and nothing arrives."""
        self._set("down")

    def mend(self) -> None:
        self._set("up")

    def _set(self, state: str) -> None:
        end = self.hosts[1]
        _ip("-n", end.namespace, "link", "set", end.device, state)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Network]:
    """Make the namespaces, take them away at the end. Needs root and ``ip``.

    Args:
        folder: for the file that serves both as ``/etc/hosts``.
    """
    own = os.getpid()
    hosts_file = folder / "hosts"
    first, second = (
        Host(f"node-{i}", f"10.77.0.{i}", f"faults-{own}-{i}", f"faults{own}-{i}"[-15:], hosts_file) for i in (1, 2)
    )
    hosts_file.write_text("127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in (first, second)))
    with ExitStack() as made:
        for host in (first, second):
            _ip("netns", "add", host.namespace)
            made.callback(_ip, "netns", "del", host.namespace)
        # Born inside: the machine's own network never sees them.
        peer = ["peer", "name", second.device, "netns", second.namespace]
        _ip("-n", first.namespace, "link", "add", first.device, "type", "veth", *peer)
        for host in (first, second):
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.device)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "link", "set", host.device, "up")
        run_tool(*first.command(["true"]))
        yield Network((first, second))


def _ip(*arguments: str) -> None:
    run_tool("ip", *arguments)
