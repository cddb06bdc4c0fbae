"""The comparison of all processes before a run, and its table."""

import dataclasses
import logging
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

import lrdint_tune.training.preflight as preflight_module
from lrdint_tune.errors import ConfigError, UnreachableError
from lrdint_tune.training.config import TrainConfig, load_config
from lrdint_tune.training.preflight import Facts, Links, preflight, spans, table, who_has_what
from tests.common.tiny_run import write_run
from tests.distributed.harness import run_ranks

CPU = torch.device("cpu")


def _facts(rank: int, host: str, device: str = "NVIDIA H100", node: str = "0") -> Facts:
    return Facts(rank, host, node, device, {"torch": "2.13.0"})


def _cluster(hosts: int, each: int = 8) -> list[Facts]:
    return [_facts(h * each + i, f"node{h:03}", node=str(h)) for h in range(hosts) for i in range(each)]


def _links(everybody: list[Facts]) -> Links:
    firsts = {one.host: one.rank for one in reversed(everybody)}.values()
    return Links(64 * 2**20, 0.004, 5e-5, {rank: 1e-4 + rank * 1e-6 for rank in firsts if rank})


@pytest.fixture
def group_of_512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 512)


@pytest.mark.usefixtures("group_of_512")
def test_table() -> None:
    everybody = _cluster(2)
    everybody[9] = _facts(9, "node001", "NVIDIA A100", node="1")
    assert table(everybody, _links(everybody)) == [
        "16 processes on 2 nodes, all with torch 2.13.0",
        "host     ranks  devices                           ping from rank 0",
        "node000  0-7    8 x NVIDIA H100                   -",
        "node001  8-15   1 x NVIDIA A100, 7 x NVIDIA H100  0.108 ms",
        "all-reduce of 64 MiB: 4.00 ms, 33.49 GB/s a rank, of one number: 0.050 ms",
    ]


@pytest.mark.usefixtures("group_of_512")
def test_table_of_512_ranks_fits_a_screen_and_shows_the_odd_host() -> None:
    everybody = _cluster(64)
    everybody[-1] = _facts(511, "node063", "NVIDIA A100", node="63")
    lines = table(everybody, _links(everybody))
    assert len(lines) == 5
    assert max(map(len, lines)) <= 160
    assert "63 hosts: node000 ... node062  0-503    8 x NVIDIA H100" in lines[2]
    assert lines[2].endswith("median 0.352 ms, slowest 0.596 ms (node062)")
    assert lines[3].startswith("node063                        504-511  1 x NVIDIA A100, 7 x")


@pytest.mark.usefixtures("group_of_512")
def test_two_nodes_of_one_name_are_two_rows() -> None:
    everybody = [_facts(0, "vm"), _facts(1, "vm", node="1")]
    rows = table(everybody, _links(everybody))
    assert [row.split("  ")[0] for row in rows[2:4]] == ["vm (node 0)", "vm (node 1)"]


def test_difference_names_hosts_and_values() -> None:
    everybody = _cluster(5, each=2)
    values = ["2.13.0"] * 8 + ["2.12.1"] * 2
    text = who_has_what(everybody, values)
    assert text == ("2.13.0 on node000, node001, node002 and 1 more hosts (ranks 0-7), 2.12.1 on node004 (ranks 8-9)")
    assert who_has_what(everybody, [str(i) for i in range(10)]).endswith("2 on node001 (rank 2), ...")


def test_spans() -> None:
    assert spans([0, 1, 2, 3, 5]) == "0-3, 5"
    assert spans(list(range(0, 20, 2))) == "0, 2, 4, 6, ..."


def _config(folder: Path) -> TrainConfig:
    return load_config(yaml.safe_load(write_run(folder).read_text()))


def _agreeing(cfg: TrainConfig) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lrdint_tune.training.preflight")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    preflight(cfg, CPU)
    return lines


def _disagreeing(cfg: TrainConfig, what: str) -> str:
    own = cfg
    if dist.get_rank() == 1 and what == "config":
        own = dataclasses.replace(cfg, optimizer={**cfg.optimizer, "lr": 0.5})
    if dist.get_rank() == 1 and what == "source":
        preflight_module.source_digest = lambda: "other"
    if dist.get_rank() == 1 and what == "torch":
        torch.__version__ = "2.12.1"  # type: ignore[assignment]
    if what == "sum":
        dist.all_reduce = _broken(dist.all_reduce)
    if what == "refused":
        dist.all_reduce = _refused
    with pytest.raises((ConfigError, UnreachableError)) as error:
        preflight(own, CPU)
    return f"{type(error.value).__name__} {error.value}"


def _broken(all_reduce: Any, tensor: torch.Tensor | None = None) -> Any:
    if tensor is None:
        return partial(_broken, all_reduce)
    all_reduce(tensor)
    tensor += 1


def _refused(tensor: torch.Tensor) -> None:
    raise RuntimeError("NCCL error\na page of it")


def test_processes_that_agree(tmp_path: Path) -> None:
    first, second = run_ranks(_agreeing, 2, _config(tmp_path))
    assert second == []
    assert first[0].startswith("2 processes on 1 node, all with python ")
    assert first[2].split()[1:3] == ["0-1", "2"]
    assert "all-reduce of 4 MiB: " in first[3]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", "ConfigError optimizer.lr: differs between processes: 0.001 on {0} (rank 0), 0.5 on {0} (rank 1); "),
        ("source", "ConfigError source of lrdint_tune: differs between processes: "),
        ("torch", "ConfigError torch: differs between processes: 2.13."),
        ("sum", "UnreachableError the all-reduce over 2 cpu processes gave 4 instead of 3 on rank "),
        ("refused", "UnreachableError the 2 processes met at None:None, but rank "),
    ],
)
def test_processes_that_do_not(tmp_path: Path, what: str, message: str) -> None:

    told = run_ranks(_disagreeing, 2, _config(tmp_path), what)
    assert all(text.startswith(message.format(socket.gethostname())) for text in told), told


def test_one_process_has_nobody_to_ask(tmp_path: Path) -> None:
    assert run_ranks(_agreeing, 1, _config(tmp_path)) == [[]]
