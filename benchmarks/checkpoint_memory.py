"""Host memory that saving and loading a sharded checkpoint takes, summed over the ranks.

    python -m benchmarks.checkpoint_memory --ranks 1 2 4

A Llama of 41.6 million parameters, all trained with AdamW: 500 MB of state. Each number is the growth of the
processes' anonymous memory (RssAnon, Linux) above what they held before, at its peak, in MB of 10^6 bytes. Saving is
asynchronous: the copy of the state beside which training may go on is part of it. Loading fills a model that is there
and allocates the optimizer's state.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from lrdint_tune.models import LlamaDecoder, llama3_2
from lrdint_tune.training.checkpoint import CheckpointManager
from lrdint_tune.training.checkpoint.state import OPTIMIZER, make_room, named_trained
from lrdint_tune.training.world import MeshShape, make_world

SIZES: dict[str, Any] = {
    "vocab_size": 32_000,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 8,
    "embed_dim": 512,
    "max_seq_len": 128,
    "intermediate_dim": 1376,
    "scale_factor": 1,
}


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) * 1024


class PeakMemory:
    """The largest :func:`anonymous_memory` while it is entered, above what it was before, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = anonymous_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, anonymous_memory())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, anonymous_memory())
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.start


@contextmanager
def process_group(rank: int, size: int, store: Path) -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded_run() -> tuple[LlamaDecoder, AdamW]:
    """The model, each block an FSDP2 group, and its optimizer before its first step."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = llama3_2(**SIZES)
    mesh = make_world(torch.device("cpu"), MeshShape(1, dist.get_world_size())).mesh["shard"]
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)  # touched: memory that was never written to does not count
    return model, AdamW(model.parameters())


def save(rank: int, size: int, folder: Path, results: Any) -> None:
    """Put the peak growth of a save into ``results``."""
    with process_group(rank, size, folder / f"save-store-{size}"):
        model, optimizer = sharded_run()
        make_room(model, optimizer, {f"{OPTIMIZER}{name}.exp_avg" for name in named_trained(model)})
        world = make_world(torch.device("cpu"), MeshShape(1, size))
        checkpoints = CheckpointManager(folder / f"of-{size}", keep_last_n=1, world=world, timeout=600)
        dist.barrier()
        with PeakMemory() as memory:
            checkpoints.save(1, model, optimizer, {}, wait=True)
        results.put(memory.growth)
        checkpoints.close()


def load(rank: int, size: int, folder: Path, results: Any, written_by: int) -> None:
    """Put the peak growth of a load, verification included, into ``results``."""
    with process_group(rank, size, folder / f"load-store-{size}-{written_by}"):
        model, optimizer = sharded_run()
        world = make_world(torch.device("cpu"), MeshShape(1, size))
        checkpoints = CheckpointManager(folder / f"of-{written_by}", keep_last_n=1, world=world, timeout=600)
        dist.barrier()
        with PeakMemory() as memory:
            path, manifest = checkpoints.find("auto", lambda path, manifest: None)
            assert path is not None and manifest is not None
            checkpoints.load(path, manifest, model, optimizer)
        results.put(memory.growth)
        checkpoints.close()


def summed(function: Any, size: int, *arguments: Any) -> float:
    """Run ``function`` on ``size`` fresh processes; MB of all of them together."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=function, args=(rank, size, arguments[0], results, *arguments[1:]))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise RuntimeError(f"{function.__name__} on {size} ranks: exit codes {failed}")
    return sum(results.get() for _ in processes) / 1e6


def measure(ranks: list[int]) -> list[tuple[str, float, float]]:
    """(what, MB, ratio to one rank) of saving, loading and loading what another number of ranks wrote."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        saved = {size: summed(save, size, folder) for size in ranks}
        loaded = {size: summed(load, size, folder, size) for size in ranks}
        rows += [(f"save on {size}", saved[size], saved[size] / saved[ranks[0]]) for size in ranks]
        rows += [(f"load on {size}", loaded[size], loaded[size] / loaded[ranks[0]]) for size in ranks]
        for size, written_by in [(s, ranks[0]) for s in ranks[1:]] + [(ranks[0], s) for s in ranks[1:]]:
            taken = summed(load, size, folder, written_by)
            rows.append((f"load on {size}, written by {written_by}", taken, taken / loaded[ranks[0]]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks, the first is 1.00")
    arguments = parser.parse_args()
    print("| | MB, all ranks | of one rank's |\n|---|---|---|")
    for what, taken, ratio in measure(arguments.ranks):
        print(f"| {what} | {taken:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
