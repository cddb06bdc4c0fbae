"""One disturbed run from its first start to its end, compared with an undisturbed one."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from lrdint_tune.errors import ReportedError
from lrdint_tune.faults.faults import Fault, Missed, Scene
from lrdint_tune.faults.network import Network, two_hosts
from lrdint_tune.faults.record import HELDOUT_LOSS, published, read_losses, recorded_step, results, resumed_step
from lrdint_tune.faults.start import TORCHRUN, Launch, Start
from lrdint_tune.faults.watch import CheckpointWatch

DECIMALS = 1e-6
MAX_STARTS = 4
_LONGEST_DELAY = 0.1  # seconds between a step and the fault
_LATEST = 0.8  # of all steps


class UndisturbedRunFailed(ReportedError):
    """There is nothing to compare with; the message ends with what the run said last."""

    exit_code = 1


@dataclass(frozen=True)
class Baseline:
    """The undisturbed run: losses by step in nats, the results' file names, how long it took, a checkpoint's size."""

    losses: dict[int, float]
    heldout: dict[int, float]
    results: set[str]
    seconds: float
    checkpoint_bytes: int

    @property
    def steps(self) -> int:
        return max(self.losses)


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        reported: what the user was told, on every host.
        codes: for every start, the exit codes of its launchers.
        steps_lost: made, recorded, and made again.
        checkpoints_lost: what happened to them, in words.
        difference: the largest of the losses' differences to the undisturbed run, in nats.
        problems: in which way this was not what was promised; empty is a pass.
    """

    fault: str
    moment: str = ""
    reported: list[str] = field(default_factory=list)
    codes: list[list[int]] = field(default_factory=list)
    steps_lost: int = 0
    checkpoints_lost: list[str] = field(default_factory=list)
    difference: float = float("inf")
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def undisturbed(launch: Launch, folder: Path, limit: float) -> Baseline:
    """Run to the end, once.

    Raises:
        UndisturbedRunFailed: it failed, or took longer than ``limit`` seconds.
    """
    folder.mkdir(parents=True)
    output_dir, begin = folder / "out", time.monotonic()
    with Start(launch.commands(output_dir), [folder / "start-1.log"]) as start:
        if not start.wait(limit):
            raise UndisturbedRunFailed(f"the undisturbed run was not over after {limit:g} s, its log: {start.logs[0]}")
        if any(start.codes()):
            raise UndisturbedRunFailed(
                f"the undisturbed run ended with {start.codes()[0]}: {_last_word(start.lines()[0])}"
            )
    checkpoints = published(output_dir / "checkpoints")
    latest = checkpoints[max(checkpoints)]
    return Baseline(
        read_losses(output_dir),
        read_losses(output_dir, HELDOUT_LOSS),
        results(output_dir),
        time.monotonic() - begin,
        sum(file.stat().st_size for file in latest.rglob("*") if file.is_file()),
    )


def disturb(
    fault: Fault, launch: Launch, baseline: Baseline, folder: Path, *, seed: str, keep_last_n: int, limit: float
) -> Outcome:
    """Start the run, make the fault, start it again until it is over.

    Args:
        limit: seconds that one start may take before it counts as one that never ends.
    """
    outcome, draw, begin = Outcome(fault.name), random.Random(seed), time.monotonic()
    folder.mkdir(parents=True)
    output_dir = folder / "out"
    with ExitStack() as stack:
        network = stack.enter_context(two_hosts(folder)) if fault.two_hosts else None
        stack.enter_context(fault.around(output_dir, baseline.checkpoint_bytes, draw))
        watch = stack.enter_context(CheckpointWatch(output_dir / "checkpoints", keep_last_n))
        lines: list[list[list[str]]] = []
        for start in _starts(launch, folder, network):
            with start:
                if not outcome.codes:
                    scene = Scene(start, output_dir, watch, draw, baseline.checkpoint_bytes, network)
                    made = _make(fault, scene, baseline.steps, outcome)
                if not start.wait(limit):
                    outcome.problems.append(f"start {len(lines) + 1} was not over after {limit:.0f} s")
                start.kill()
                outcome.codes.append(start.codes())
                lines.append(start.lines())
            watch.check()
            if len(lines) == 1:
                reached = recorded_step(output_dir)
                if made:
                    fault.repair(scene)
            elif len(lines) == 2:
                outcome.steps_lost = reached - resumed_step(lines[1][0])
            if not any(outcome.codes[-1]) or len(lines) == MAX_STARTS:
                break
        outcome.checkpoints_lost = watch.lost
        told = [reported(of_host, fault.says) for of_host in zip(*lines[:2], strict=False)]
        outcome.reported = [line.replace(f"{folder.parent}/", "") for line in told]
        outcome.seconds = time.monotonic() - begin
        _judge(outcome, fault, launch, baseline, output_dir)
    return outcome


def reported(starts: Sequence[list[str]], says: str) -> str:
    """What the user was told: the line that says what it has to, else the first error, else nothing.

    Args:
        starts: the lines of the disturbed start and, if there was one, the next.
    """
    lines = [line for start in starts for line in start]
    fitting = [line for line in lines if re.search(says, line)]
    errors = [line for line in lines if line.startswith(("error:", "warning:"))]
    return next(iter([line for line in errors if line in fitting] or fitting or errors), "")


def _starts(launch: Launch, folder: Path, network: Network | None) -> Iterator[Start]:
    commands = launch.commands(folder / "out", network)
    hosts = [f".{host.name}" for host in network.hosts] if network else [""]
    for i in count(1):
        yield Start(commands, [folder / f"start-{i}{host}.log" for host in hosts])


def _make(fault: Fault, scene: Scene, steps: int, outcome: Outcome) -> bool:
    """Wait for a random moment and inject; False, with a problem noted, when that could not be done."""
    step = scene.draw.randint(1, int(steps * _LATEST))
    delay = scene.draw.uniform(0.0, _LONGEST_DELAY)
    checkpoints = scene.output_dir / "checkpoints"
    try:
        scene.until(lambda: recorded_step(scene.output_dir) >= step)
        scene.until(lambda: len(published(checkpoints)) >= fault.checkpoints)
        time.sleep(delay)
        done = fault.inject(scene)
    except Missed as reason:
        outcome.problems.append(f"not made: {reason}")
        return False
    outcome.moment = f"after step {recorded_step(scene.output_dir)}; {done}"
    return True


def _judge(outcome: Outcome, fault: Fault, launch: Launch, baseline: Baseline, output_dir: Path) -> None:
    first, last = outcome.codes[0], outcome.codes[-1]
    # torchrun itself ends with 1 whatever its ranks ended with.
    expected = fault.codes | ({1} if launch.module == TORCHRUN else set())
    for code in set(first) - expected:
        outcome.problems.append(f"exit code {code}, expected {' or '.join(map(str, sorted(fault.codes)))}")
    if any(last):
        outcome.problems.append(f"did not get to its end in {len(outcome.codes)} starts")
    if not all(re.search(fault.says, line) for line in outcome.reported):
        outcome.problems.append("did not say what happened")
    if outcome.steps_lost and not fault.loses_steps:
        outcome.problems.append(f"lost {outcome.steps_lost} steps")
    outcome.problems += [f"checkpoint {what}" for what in outcome.checkpoints_lost]
    try:
        losses, heldout = read_losses(output_dir), read_losses(output_dir, HELDOUT_LOSS)
    except (OSError, ValueError) as error:
        outcome.problems.append(f"no readable record of the losses: {error}")
        return
    if list(losses) != list(baseline.losses) or heldout.keys() != baseline.heldout.keys():
        outcome.problems.append("not every step is recorded once")
    pairs = [(losses, baseline.losses), (heldout, baseline.heldout)]
    outcome.difference = max(
        abs(got.get(step, float("inf")) - value) for got, want in pairs for step, value in want.items()
    )
    if outcome.difference > DECIMALS:
        outcome.problems.append(f"losses differ by up to {outcome.difference:.1e}")
    missing = sorted(baseline.results - results(output_dir))
    if missing:
        outcome.problems.append(f"results without {', '.join(missing)}")


def _last_word(lines: list[str]) -> str:
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it said nothing"])[-1]
