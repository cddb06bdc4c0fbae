"""torchrun's command line, checked."""

from __future__ import annotations

import argparse
import os
import signal
import uuid
from typing import NoReturn

from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, get_args_parser, parse_min_max_nnodes

from lrdint_tune.errors import ConfigError

# torch's own leave SIGUSR1 out and give 30 seconds. As environment variables, which the command line overrides.
DEFAULTS = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT", "PET_SHUTDOWN_TIMEOUT": "600"}
DEFAULT_PORT = 29400  # torch's, of an endpoint without one


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """torchrun's options, with ``standalone`` set for a single node without an endpoint.

    Raises:
        ConfigError: an option that torchrun does not have, or a combination that could only wait or go wrong.
    """

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; python -m lrdint_tune.launch --help lists the options")

    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    parser = get_args_parser()
    parser.prog = "python -m lrdint_tune.launch"
    setattr(parser, "error", refuse)  # noqa: B010  # argparse would print a page of usage
    if "PET_RDZV_BACKEND" not in os.environ:
        parser.set_defaults(rdzv_backend=None)
    args = parser.parse_args(arguments)
    try:
        _, nodes = parse_min_max_nnodes(args.nnodes)
    except (RuntimeError, ValueError):
        raise ConfigError(f"--nnodes={args.nnodes}: must be a number, or two as in 2:4") from None
    if args.run_path:
        raise ConfigError(
            "--run-path: is not supported; start the recipe with -m lrdint_tune.full_finetune_distributed"
        )
    if args.rdzv_backend == "static":
        raise ConfigError(
            "--rdzv_backend=static: nodes are numbered by hand, and a wrong number waits for ever; leave it out (c10d)"
        )
    if nodes > 1 and args.standalone:
        raise ConfigError(f"--nnodes={args.nnodes}: with --standalone each node would train alone; remove --standalone")
    if nodes > 1 and not args.rdzv_endpoint:
        raise ConfigError(
            f"--nnodes={args.nnodes}: the nodes find each other at --rdzv_endpoint, which is missing; add "
            "--rdzv_endpoint HOST:PORT, the same on every node, HOST being one of them"
        )
    args.standalone = args.standalone or not args.rdzv_endpoint
    return args


def compose(args: argparse.Namespace) -> tuple[LaunchConfig, str, list[str]]:
    """torchrun's configuration, the workers' program and its arguments.

    Raises:
        ConfigError: a value that torch refuses.
    """
    if args.standalone:
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    args.rdzv_backend = args.rdzv_backend or "c10d"
    args.master_port = 0  # for static rendezvous only
    try:
        host, port = parse_rendezvous_endpoint(args.rdzv_endpoint, default_port=DEFAULT_PORT)
        config, command, command_args = config_from_args(args)
        signals = [signal.Signals[name] for name in config.signals_to_handle.replace(" ", "").split(",")]
    except KeyError as error:
        raise ConfigError(f"--signals-to-handle={args.signals_to_handle}: there is no signal {error}") from None
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    config.signals_to_handle = ",".join(s.name for s in signals)
    if config.nproc_per_node < 1:
        raise ConfigError(f"--nproc_per_node={args.nproc_per_node}: must be at least 1")
    if config.max_nodes > 1 and port == 0:
        raise ConfigError(f"--rdzv_endpoint={args.rdzv_endpoint}: give a port, e.g. {host}:29500")
    assert isinstance(command, str)  # --run-path would be a function
    return config, command, command_args
