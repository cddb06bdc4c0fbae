"""Nodes that cannot meet: what is said, without waiting longer than for joining."""

import socket

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousError

from lrdint_tune.launching.nodes import describe_loss, is_own_address, meet
from lrdint_tune.launching.options import compose, parse
from lrdint_tune.reachability import listens, wait_for


def _meet(endpoint: str, *conf: str) -> str:
    options = ",".join(["join_timeout=0", *conf])
    config, _, _ = compose(parse(["--nnodes=2", f"--rdzv_endpoint={endpoint}", f"--rdzv_conf={options}", "x.py"]))
    with pytest.raises(RendezvousError) as error:
        meet(config)
    return describe_loss(error.value, config, None)


def test_unknown_host() -> None:
    text = _meet("nosuch.invalid:29500")
    assert text.startswith("--rdzv_endpoint=nosuch.invalid:29500: cannot be reached from ")
    assert text.endswith("; does this command run on nosuch.invalid, is the port open?")


def test_closed_port() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = _meet(f"127.0.0.1:{port}", "is_host=false")
    assert "Connection refused, for 0 s" in text
    assert not listens("127.0.0.1", port)


def test_waiting_is_told_once_and_ends_when_there_is_a_listener() -> None:
    told = []
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        wait_for("127.0.0.1", late.getsockname()[1], 5, lambda: (told.append(1), late.listen()) and None)
    assert told == [1]


def test_own_addresses() -> None:
    assert is_own_address("127.0.0.1")
    assert is_own_address(socket.gethostname())
    assert not is_own_address("192.0.2.1")  # reserved for documentation
    assert not is_own_address("nosuch.invalid")
