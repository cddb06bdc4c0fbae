"""What `plan` predicts for a run's peak memory, beside what torch's allocator counts in a real one on CPU processes.

    python -m benchmarks.plan_memory --config configs/quickstart.yaml
    python -m benchmarks.plan_memory --config configs/quickstart.yaml enable_activation_checkpointing=true

Two gloo processes train two optimizer steps, from real weights and data; torch's profiler records every allocation and
release of the whole process, and the peak is that of the second step. What lasts (parameters, optimizer state) is also
counted tensor by tensor. The process's resident size is not looked at.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.configs import read_config
from benchmarks.measure import allocations, muted_stderr
from lrdint_tune.planning import plan
from lrdint_tune.planning.memory import OPTIMIZER, PARAMETERS
from lrdint_tune.planning.options import PlanOptions
from lrdint_tune.planning.trace import storage_bytes
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.trainer import Trainer
from lrdint_tune.training.world import end_world, start_world

STEP = "measured optimizer step"


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank: held by the allocator before the step, its most in the step, and of what lasts."""

    before: int
    peak: int
    parameters: int
    optimizer_state: int


def measure(cfg: TrainConfig) -> Measured:
    """Train two steps of ``cfg`` on this process of a launched group, and look at the second.

    The steps log, as those of a run do; nothing but what the trainer's constructor writes is written.
    """
    gc.collect()  # what an earlier run left would be released, and counted, in this one
    with muted_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        world = start_world(cfg.device, **cfg.mesh_dims)
        trainer = Trainer(cfg, world)
        for _ in range(2):
            with record_function(STEP):
                trainer._train_step(logging_step=True)
        trainer.checkpoints.close()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    begin, end = max((event.start_time_ns, event.end_time_ns) for event in roots if event.name == STEP)
    held = before = peak = 0
    for time, size in sorted(allocations(roots)):
        held += size
        if time < begin:
            before = held
        elif time < end:
            peak = max(peak, held)
    state = [t for values in trainer.optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    return Measured(before, peak, _local_bytes(list(trainer.model.parameters())), _local_bytes(state))


def _local_bytes(tensors: list[Any]) -> int:
    return storage_bytes(t.to_local() if isinstance(t, DTensor) else t for t in tensors)


def _rank(rank: int, size: int, port: int, cfg: TrainConfig, results: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        results.put((rank, asdict(measure(cfg))))
    finally:
        end_world()


def launch(cfg: TrainConfig, size: int) -> Measured:
    """:func:`measure` on ``size`` new processes; rank 0's, whose shards are the largest."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(r, size, port, cfg, results)) for r in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"the ranks ended with {[process.exitcode for process in ranks]}")
    return Measured(**dict(results.get() for _ in ranks)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    cfg = read_config(options.config, options.overrides)

    memory = plan(cfg, PlanOptions(world_size=options.ranks, gpu="cpu").target).memory
    measured = launch(cfg, options.ranks)
    print(f"bytes of rank 0 of {options.ranks}, peak at: {memory.moment}")
    print(f"{'':<24}{'predicted':>16}{'measured':>16}{'ratio':>8}")
    for name, predicted, found in (
        ("parameters", memory.peak[PARAMETERS], measured.parameters),
        ("optimizer state", memory.peak[OPTIMIZER], measured.optimizer_state),
        ("peak of a step", memory.total, measured.peak),
    ):
        print(f"{name:<24}{predicted:>16,}{found:>16,}{predicted / found:>8.3f}")


if __name__ == "__main__":
    main()
