"""Before anything is loaded: do all processes run the same program on the same config, and how fast do they talk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import socket
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lrdint_tune
from lrdint_tune.errors import ConfigError, UnreachableError
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.rendezvous import cannot_talk

log = logging.getLogger(__name__)

# Large enough to be limited by the links; the gloo of a CPU is slower by orders of magnitude.
ALL_REDUCE_BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
REPEATS = 5
# From so many hosts on, those with the same devices share a row of the table.
MANY_HOSTS = 16


@dataclass(frozen=True)
class Facts:
    """What one process reports.

    Attributes:
        node: torchrun's number of the node; two containers may have one name.
        same: what must be equal on all ranks.
    """

    rank: int
    host: str
    node: str
    device: str
    same: dict[str, str]


@dataclass(frozen=True)
class Links:
    """What was measured, in seconds: an all-reduce of ``size`` bytes per rank (the fastest of five), one of a single
    number, and messages of one number from rank 0 to the first rank of each other node and back (medians)."""

    size: int
    all_reduce: float
    single: float
    ping: dict[int, float]

    @property
    def gb_per_s(self) -> float:
        """What each rank sends and receives in the all-reduce, if it goes round a ring: 2 (n - 1) / n of the size."""
        ranks = dist.get_world_size()
        return 2 * (ranks - 1) / ranks * self.size / self.all_reduce / 1e9


def preflight(cfg: TrainConfig, device: torch.device) -> None:
    """Compare all processes, check a sum over them, and log a table of hosts, ranks, devices and links on rank 0.

    Every rank must call it, with the process group set up. One process has nobody to compare with.

    Raises:
        ConfigError: versions, source or config differ; names what, the hosts and the values.
        UnreachableError: the sum is wrong, or the processes cannot talk to each other.
    """
    if dist.get_world_size() == 1:
        return
    try:
        everybody = _gather(facts(cfg, device))
        _check_same(everybody, cfg)
        _check_sum(device)
        links = _measure(device, [ranks[0].rank for ranks in by_node(everybody)])
    except RuntimeError as error:  # what collectives raise
        raise cannot_talk(str(error).splitlines()[0], dist.get_rank(), dist.get_world_size()) from None
    if dist.get_rank() == 0:
        for line in table(everybody, links):
            log.info(line)


def facts(cfg: TrainConfig, device: torch.device) -> Facts:
    """This process's."""
    versions = {name: metadata.version(name) for name in ("torchtune", "torchao")}
    return Facts(
        rank=dist.get_rank(),
        host=socket.gethostname(),
        node=os.environ.get("GROUP_RANK", ""),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({os.cpu_count()} cores)",
        same={
            "python": platform.python_version(),
            "torch": torch.__version__,
            **versions,
            "lrdint_tune": lrdint_tune.__version__,
            "source of lrdint_tune": source_digest(),
            "config": hashlib.sha256(json.dumps(flat_config(cfg), sort_keys=True).encode()).hexdigest()[:12],
        },
    )


def source_digest() -> str:
    """Of every Python file of this package: two nodes may have the same version with other changes."""
    root = Path(lrdint_tune.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def flat_config(cfg: TrainConfig) -> dict[str, str]:
    """Dotted key -> value, as text."""

    def flatten(prefix: str, value: Any) -> dict[str, str]:
        if isinstance(value, dict) and value:
            parts = (flatten(f"{prefix}.{key}" if prefix else str(key), part) for key, part in value.items())
            return {key: text for part in parts for key, text in part.items()}
        return {prefix: repr(value)}

    return flatten("", dataclasses.asdict(cfg))


def _gather(own: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def _check_same(everybody: list[Facts], cfg: TrainConfig) -> None:
    for key in everybody[0].same:
        values = [one.same[key] for one in everybody]
        if len(set(values)) == 1:
            continue
        if key == "config":
            configs = _gather(flat_config(cfg))  # on all ranks: they all see the difference
            key = next(k for k in sorted(set().union(*configs)) if len({c.get(k) for c in configs}) > 1)
            values = [c.get(key, "not set") for c in configs]
            fix = "start every node with the same config and overrides"
        else:
            fix = "install the same on every node"
        raise ConfigError(f"{key}: differs between processes: {who_has_what(everybody, values)}; {fix}")


def who_has_what(everybody: list[Facts], values: list[str]) -> str:
    """``2.13.0 on node1 (ranks 0-7), 2.12.1 on node2 (ranks 8-15)``, the most frequent first."""
    parts = []
    for value, count in Counter(values).most_common(3):
        ranks = [one.rank for one, own in zip(everybody, values, strict=True) if own == value]
        hosts = list(dict.fromkeys(everybody[rank].host for rank in ranks))
        named = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more hosts" if len(hosts) > 3 else "")
        parts.append(f"{value} on {named} (rank{'s' if count > 1 else ''} {spans(ranks)})")
    return ", ".join(parts) + (", ..." if len(set(values)) > 3 else "")


def spans(numbers: list[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3, 5; at most four parts."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    texts = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")


def _check_sum(device: torch.device) -> None:
    ranks = dist.get_world_size()
    for kind in sorted({"cpu", device.type}):
        number = torch.tensor([dist.get_rank() + 1.0], device=device if kind == device.type else kind)
        dist.all_reduce(number)
        if number.item() != ranks * (ranks + 1) / 2:
            raise UnreachableError(
                f"the all-reduce over {ranks} {kind} processes gave {number.item():g} instead of "
                f"{ranks * (ranks + 1) // 2} on rank {dist.get_rank()} ({socket.gethostname()}); look at its network"
            )


def _measure(device: torch.device, first_ranks: list[int]) -> Links:
    size = ALL_REDUCE_BYTES[device.type]
    large = torch.zeros(size // 4, device=device)
    single = torch.zeros(1, device=device)
    return Links(
        size=size,
        all_reduce=min(_time_all_reduces(large)),
        single=statistics.median(_time_all_reduces(single)),
        ping={other: _ping(other) for other in first_ranks if other},
    )


def _time_all_reduces(tensor: torch.Tensor) -> list[float]:
    """Seconds of each of five, after a first one that sets up the connections."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _ping(other: int) -> float:
    """Seconds from rank 0 to ``other`` and back, over gloo; 0 on ranks that take no part."""
    rank, message, seconds = dist.get_rank(), torch.zeros(1), []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        if rank == 0:
            dist.send(message, other)
            dist.recv(message, other)
        elif rank == other:
            dist.recv(message, 0)
            dist.send(message, 0)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) if rank in (0, other) else 0.0


def by_node(everybody: list[Facts]) -> list[list[Facts]]:
    """The processes of each node, nodes in the order of their first ranks."""
    nodes: dict[tuple[str, str], list[Facts]] = {}
    for one in everybody:
        nodes.setdefault((one.host, one.node), []).append(one)
    return list(nodes.values())


def table(everybody: list[Facts], links: Links) -> list[str]:
    """Lines for the log: a row for each node, or from 17 on for those that are alike."""
    nodes = by_node(everybody)
    names = Counter(node[0].host for node in nodes)
    groups: dict[tuple[Any, ...], list[list[Facts]]] = {}
    for i, node in enumerate(nodes):
        devices = tuple(sorted(Counter(one.device for one in node).items()))
        groups.setdefault((devices, None if len(nodes) > MANY_HOSTS else i), []).append(node)
    rows = [("host", "ranks", "devices", "ping from rank 0")]
    for (devices, _), alike in groups.items():
        first = alike[0][0]
        name = first.host if names[first.host] == 1 else f"{first.host} (node {first.node})"
        if len(alike) > 1:
            name = f"{len(alike)} hosts: {name} ... {alike[-1][0].host}"
        ranks = spans([one.rank for node in alike for one in node])
        shown = ", ".join(f"{count} x {device}" for device, count in devices)
        rows.append((name, ranks, shown, _pings([(node[0].host, links.ping.get(node[0].rank)) for node in alike])))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    same = ", ".join(f"{key} {value}" for key, value in everybody[0].same.items())
    return [
        f"{len(everybody)} processes on {len(nodes)} node{'s' if len(nodes) > 1 else ''}, all with {same}",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        f"all-reduce of {links.size / 2**20:g} MiB: {links.all_reduce * 1e3:.2f} ms, {links.gb_per_s:.2f} GB/s a rank, "
        f"of one number: {links.single * 1e3:.3f} ms",
    ]


def _pings(measured: list[tuple[str, float | None]]) -> str:
    others = [(seconds * 1e3, host) for host, seconds in measured if seconds is not None]
    if len(others) < 2:
        return f"{others[0][0]:.3f} ms" if others else "-"
    slowest = max(others)
    return f"median {statistics.median(ms for ms, _ in others):.3f} ms, slowest {slowest[0]:.3f} ms ({slowest[1]})"
