"""torchrun, with errors in one line and the workers' own exit codes.

    python -m lrdint_tune.launch --nproc_per_node 8 -m lrdint_tune.full_finetune_distributed --config CONFIG
    python -m lrdint_tune.launch --nnodes 2 --nproc_per_node 8 --rdzv_id ID --rdzv_endpoint HOST:29500 \\
        -m lrdint_tune.full_finetune_distributed --config CONFIG                    # on each of the two nodes

Takes torchrun's options. What differs: combinations that would wait for ever are refused; ``--rdzv_backend`` is c10d
where there is an endpoint; SIGUSR1 is passed on too, and after a signal the workers have ten minutes to save
(``--signals-to-handle``, ``--shutdown-timeout``); codes that a restart cannot change are not restarted under
``--max-restarts``. Exit codes: those of :mod:`lrdint_tune.exit_codes`, of the worker that failed first; 128 + n for
one killed by signal n, and after a second signal n.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from lrdint_tune.errors import ConfigError
from lrdint_tune.exit_codes import BAD_INPUT
from lrdint_tune.launching.early import end_at_signals


def main(arguments: list[str] | None = None) -> int:
    """Run the workers of this node; returns the exit code of the process."""
    before = end_at_signals()
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
    if quiet:  # read while torch is imported; its store prints a page for each lost connection
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    from lrdint_tune.launching.options import compose, parse
    from lrdint_tune.launching.run import launch

    if quiet:  # for the workers: the pages are warnings, what NCCL's watchdog says are errors
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    if "LOGLEVEL" not in os.environ:  # torch logs tracebacks of what is said here in one line
        logging.disable(logging.CRITICAL)
    try:
        config, command, command_args = compose(parse(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    for number in before.keys() - {signal.Signals[name] for name in config.signals_to_handle.split(",")}:
        signal.signal(number, before[number])
    return launch(config, command, command_args)


if __name__ == "__main__":
    sys.exit(main())
