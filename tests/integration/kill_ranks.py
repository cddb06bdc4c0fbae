"""Kill ranks of a torchrun job at random moments and compare its losses with an uninterrupted run's.

    python tests/integration/kill_ranks.py                       # five kills of a tiny run, about two minutes
    python tests/integration/kill_ranks.py --config configs/quickstart.yaml --kills 5 --seed 1 max_steps_per_epoch=20

Both runs use ``torchrun --standalone --nproc_per_node 2 --max-restarts KILLS``. Prints a table; exit code 0 when every
step's loss is equal to 6 decimals. Linux only: it finds the ranks in /proc.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from lrdint_tune.faults.processes import ranks_of  # noqa: E402  # also run as a script
from lrdint_tune.faults.record import published, recorded_step  # noqa: E402
from tests.common.tiny_run import read_losses, write_run  # noqa: E402

RECIPE = "lrdint_tune.full_finetune_distributed"
# 24 steps of a few hundredths of a second, a checkpoint every 3.
TINY = {"max_steps_per_epoch": 12, "global_batch_size": 2, "dataset_val__num_rows": 4}


@dataclass(frozen=True)
class Kill:
    """One ``kill -9``: the rank, the last step it had recorded, and the checkpoint that stood then."""

    rank: int
    pid: int
    step: int
    checkpoint: int


def torchrun(*arguments: str, processes: int = 2, restarts: int = 0) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, f"--max-restarts={restarts}", "-m", RECIPE, *arguments]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def record_file(output_dir: Path) -> int | None:
    """Identifies the file that steps are recorded in."""
    file = output_dir / "logs" / "metrics.jsonl"
    return file.stat().st_ino if file.is_file() else None


def run_with_kills(
    config: Path, output_dir: Path, overrides: list[str], *, steps: int, kills: int, seed: int
) -> list[Kill]:
    """Start the job and kill a random rank ``kills`` times, each time somewhere after a random step.

    Raises:
        RuntimeError: the job failed, or was over before the last kill.
    """
    draw = random.Random(seed)
    done: list[Kill] = []
    command = torchrun("--config", str(config), f"output_dir={output_dir}", *overrides, restarts=kills)
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / "torchrun.log", "wb") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), cwd=REPOSITORY)
        try:
            earlier = None
            for target in sorted(draw.sample(range(1, steps * 3 // 4), kills)):
                # Each start begins a new file; until then the record is of the processes killed before.
                while job.poll() is None and (record_file(output_dir) == earlier or recorded_step(output_dir) < target):
                    time.sleep(0.01)
                earlier = record_file(output_dir)
                time.sleep(draw.uniform(0, 0.1))
                ranks, rank = ranks_of(job.pid), draw.randrange(2)
                if rank not in ranks:
                    break
                done.append(
                    Kill(
                        rank,
                        ranks[rank],
                        recorded_step(output_dir),
                        max(published(output_dir / "checkpoints"), default=0),
                    )
                )
                os.kill(ranks[rank], signal.SIGKILL)
            code = job.wait()
        finally:
            job.kill()
    if code or len(done) < kills:
        text = (output_dir / "torchrun.log").read_text(errors="replace")
        raise RuntimeError(f"exit code {code} after {len(done)} of {kills} kills\n{text[-5000:]}")
    return done


def run_uninterrupted(config: Path, output_dir: Path, overrides: list[str]) -> dict[int, float]:
    command = torchrun("--config", str(config), f"output_dir={output_dir}", *overrides)
    subprocess.run(
        command, check=True, env=environment(), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return read_losses(output_dir)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a training config; default: a tiny run")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ranks")
    parser.add_argument("--output-dir", type=Path, default=Path(tempfile.mkdtemp(prefix="kill_ranks-")))
    arguments, overrides = parser.parse_known_args()
    folder: Path = arguments.output_dir
    config = arguments.config or write_run(folder, **TINY)

    expected = run_uninterrupted(config, folder / "whole", overrides)
    kills = run_with_kills(
        config, folder / "killed", overrides, steps=len(expected), kills=arguments.kills, seed=arguments.seed
    )
    losses = read_losses(folder / "killed")

    print(f"{'kill -9':<8}{'rank':>6}{'pid':>9}{'after step':>12}{'checkpoint':>12}")
    for i, kill in enumerate(kills, start=1):
        print(f"{i:<8}{kill.rank:>6}{kill.pid:>9}{kill.step:>12}{kill.checkpoint:>12}")
    same = list(losses) == list(expected)
    difference = max((abs(losses[s] - expected[s]) for s in expected if s in losses), default=float("inf"))
    print(f"\n{len(losses)} of {len(expected)} steps recorded; largest difference in loss {difference:.1e} nats")
    print(f"output: {folder}")
    return 0 if same and difference <= 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
