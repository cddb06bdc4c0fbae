"""The workers of this node, from the first signal handler to the exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading

from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig

from lrdint_tune.exit_codes import DONE, INTERRUPTED, LOST_RANK, PREEMPTED
from lrdint_tune.launching.agent import Agent, ignore_signals, plural, root_cause, say, shell_code, take_signals
from lrdint_tune.launching.early import CODES, nothing_to_save
from lrdint_tune.launching.nodes import describe_loss, meet
from lrdint_tune.launching.watchdog import start_watchdog

CLOSING_SECONDS = 10.0


def launch(config: LaunchConfig, command: str, command_args: list[str]) -> int:
    """Meet the other nodes, run the workers, and say how they ended; returns the exit code."""
    agent, handler, by_signal = None, None, False
    take_signals(signal.Signals[name] for name in config.signals_to_handle.split(","))
    try:
        handler = meet(config)
        agent = Agent(
            spec=WorkerSpec(
                role=config.role,
                local_world_size=config.nproc_per_node,
                entrypoint=command,
                args=tuple(command_args),
                rdzv_handler=handler,
                max_restarts=config.max_restarts,
                monitor_interval=config.monitor_interval,
                local_addr=config.local_addr,
                event_log_handler=config.event_log_handler,
                numa_options=config.numa_options,
                duplicate_stdout_filters=config.duplicate_stdout_filters,
                duplicate_stderr_filters=config.duplicate_stderr_filters,
                virtual_local_rank=config.virtual_local_rank,
            ),
            logs_specs=config.logs_specs,  # type: ignore[arg-type]  # never None after __post_init__
            start_method=config.start_method,
            log_line_prefix_template=config.log_line_prefix_template,
            shutdown_timeout=config.shutdown_timeout,  # type: ignore[arg-type]
        )
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle
        start_watchdog(agent, config.rdzv_endpoint)
        result = agent.run()
        failed = result is None or result.is_failed()  # None: torch found the rendezvous full or closed
        return shell_code(agent.cause[1]) if failed and agent.cause else (LOST_RANK if failed else DONE)
    except SignalException as stop:
        by_signal = True
        return after_signal(agent, stop.sigval)
    except RendezvousError as error:
        print(f"error: {describe_loss(error, config, handler)}", file=sys.stderr, flush=True)
        return after_lost_nodes(agent)
    finally:
        ignore_signals()  # the code is known
        # After a signal the others may go on, as torchrun lets them.
        if handler is not None and not by_signal:
            # Where the store cannot be reached, nobody is left to be told.
            closing = threading.Thread(target=handler.shutdown, daemon=True)
            closing.start()
            closing.join(CLOSING_SECONDS)


def after_signal(agent: Agent | None, first: signal.Signals) -> int:
    """The exit code when a signal ended the agent: the workers' own, if there were any to end."""
    # Not when it came so late that all had saved.
    if agent is not None and agent.forced and set(agent.stopped.values()) - saved_codes(agent.forced):
        say(f"{agent.forced.name}, the second signal: ended at once")
        return 128 + agent.forced
    unsaved = CODES.get(first, 128 + first)
    if agent is None or not agent.stopped:
        say(nothing_to_save(first))
        return unsaved
    # One that died of the signal itself was still importing: the recipe handles it before it has anything to save.
    codes = {rank: unsaved if code == -first else code for rank, code in agent.stopped.items()}
    for code in sorted(set(codes.values())):
        ranks = [rank for rank in sorted(codes) if codes[rank] == code]
        say(f"rank{plural(ranks)}: exit code {shell_code(code)} after {first.name}")
    unclean = {rank: code for rank, code in codes.items() if code not in (DONE, unsaved)}
    return shell_code(root_cause(unclean or codes)[1])


def saved_codes(forced: signal.Signals) -> set[int]:
    """Codes of workers that a second signal did not end: 130 may come of a second SIGINT as well."""
    return {DONE, PREEMPTED, INTERRUPTED} - {128 + forced}


def after_lost_nodes(agent: Agent | None) -> int:
    """The exit code when the nodes did not meet, or lost each other."""
    if agent is not None and agent.stopped:
        # One that died of this agent's SIGTERM has not said why.
        codes = {rank: LOST_RANK if code == -signal.SIGTERM else code for rank, code in agent.stopped.items()}
        return shell_code(root_cause(codes)[1])
    if agent is not None and agent.cause is not None:
        return shell_code(agent.cause[1])
    return LOST_RANK
