"""torchrun's options: what is refused before anything starts, and what becomes of the rest."""

import os

import pytest

from lrdint_tune.errors import ConfigError
from lrdint_tune.launching.options import compose, parse

SCRIPT = ["-m", "lrdint_tune.full_finetune_distributed", "--config", "c.yaml"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither torchrun's variables from outside, nor those that parse() sets."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith("PET_")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nnodes", "2"], "--nnodes=2: .* --rdzv_endpoint, which is missing; add --rdzv_endpoint HOST:PORT"),
        (["--nnodes=1:4"], "--nnodes=1:4: .* --rdzv_endpoint, which is missing"),
        (["--nnodes=2", "--master_addr=node1", "--node_rank=1"], "--rdzv_endpoint, which is missing"),
        (["--nnodes=2", "--standalone", "--rdzv_endpoint=node1:1"], "with --standalone each node would train alone"),
        (["--nnodes=2", "--rdzv_backend=static", "--rdzv_endpoint=node1:1"], "--rdzv_backend=static: .*leave it out"),
        (["--nnodes=2", "--rdzv_endpoint=node1:0"], "--rdzv_endpoint=node1:0: give a port, e.g. node1:29500"),
        (["--nnodes=2", "--rdzv_endpoint=node1:abc"], "port number of the rendezvous endpoint 'node1:abc'"),
        (["--nnodes=two"], "--nnodes=two: must be a number"),
        (["--nnodes=0"], "min_nodes must be > 0"),
        (["--nproc_per_node=0"], "--nproc_per_node=0: must be at least 1"),
        (["--nproc_per_node=many"], "Unsupported nproc_per_node value: many"),
        (["--max-restarts=-1"], "max_restarts must be >= 0"),
        (["--signals-to-handle=SIGFOO"], "--signals-to-handle=SIGFOO: there is no signal 'SIGFOO'"),
        (["--shutdown-timeout=-1"], "shutdown_timeout must be non-negative"),
        (["--run-path"], "--run-path: is not supported"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option.*--help lists the options"),
    ],
)
def test_refused_in_one_line(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        compose(parse([*options, *SCRIPT]))
    assert "\n" not in str(error.value)


def test_one_node_meets_nobody() -> None:
    config, _, arguments = compose(parse(["--nproc_per_node", "2", *SCRIPT]))
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "localhost:0")
    assert arguments == ["-u", *SCRIPT]


def test_defaults_and_what_overrides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--nnodes=2", "--rdzv_endpoint=node1:29500", "--rdzv_id=7"]
    config, _, _ = compose(parse([*given, *SCRIPT]))
    assert (config.rdzv_backend, config.run_id, config.min_nodes) == ("c10d", "7", 2)
    assert config.shutdown_timeout == 600
    assert "SIGUSR1" in config.signals_to_handle.split(",")

    monkeypatch.setitem(os.environ, "PET_SHUTDOWN_TIMEOUT", "40")
    config, _, _ = compose(parse([*given, "--signals-to-handle=SIGTERM, SIGUSR2", *SCRIPT]))
    assert (config.shutdown_timeout, config.signals_to_handle) == (40, "SIGTERM,SIGUSR2")
