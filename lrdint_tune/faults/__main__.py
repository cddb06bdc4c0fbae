"""Disturb real runs at random moments, start each again until it is over, and compare it with an undisturbed one.

    python -m lrdint_tune.faults --output_dir output/faults
    python -m lrdint_tune.faults --output_dir output/faults --config configs/quickstart.yaml --num_faults 5 epochs=1

Without --config it makes itself a random Llama of about 260,000 parameters and word problems. Every fault has a run of
its own, in a folder of its own; logs and checkpoints stay there. Other arguments are `key=value` overrides of the
config. Linux only; full disks and cut networks need root and are left out without it.

Exit codes: 0 everything as promised, 1 not, 2 bad input.
"""

from __future__ import annotations

import argparse
import random
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

from lrdint_tune.errors import ConfigError, ReportedError
from lrdint_tune.exit_codes import DONE
from lrdint_tune.faults import report
from lrdint_tune.faults.experiment import Baseline, Outcome, disturb, undisturbed
from lrdint_tune.faults.faults import FAULTS, Fault, unavailable
from lrdint_tune.faults.start import TORCHRUN, Launch
from lrdint_tune.faults.tiny_run import write_stories_run

OWN_LAUNCHER = "lrdint_tune.launch"
FAILED = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the overrides for the runs."""
    parser = argparse.ArgumentParser(
        prog="python -m lrdint_tune.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ", ".join(fault.name for fault in FAULTS)
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder, for everything")
    parser.add_argument("--config", type=Path, help="of the run to disturb; device, steps and data are its own")
    parser.add_argument("--num_faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the faults' order, moments and victims")
    parser.add_argument("--nproc_per_node", type=int, default=2, help="ranks; over two hosts half of them on each")
    parser.add_argument("--only", action="append", metavar="FAULT", help=f"these faults only, out of: {names}")
    parser.add_argument("--launcher", choices=(OWN_LAUNCHER, TORCHRUN), default=OWN_LAUNCHER)
    parser.add_argument("--train_timeout_seconds", type=int, default=10, help="what a hang may last")
    parser.add_argument("--save_every_n_steps", type=int, default=4)
    parser.add_argument("--keep_last_n_checkpoints", type=int, default=2)
    parser.add_argument(
        "--limit", type=float, help="seconds for one start; default: 60 and five times an undisturbed run"
    )
    parser.add_argument("--document", type=Path, help="a Markdown file whose table of faults is replaced")
    return parser.parse_known_args(arguments)


def choose(number: int, seed: int, among: list[type[Fault]]) -> list[type[Fault]]:
    """Each once, in random order, then each once more, and so on."""
    draw = random.Random(seed)
    chosen: list[type[Fault]] = []
    while len(chosen) < number:
        chosen += draw.sample(among, len(among))
    return chosen[:number]


def possible(only: list[str] | None, world_size: int) -> tuple[list[type[Fault]], list[str]]:
    """The faults that can be made here, and a line for each that cannot.

    Raises:
        ConfigError: an unknown name, or none is left.
    """
    names = [fault.name for fault in FAULTS]
    for name in only or []:
        if name not in names:
            raise ConfigError(f"--only {name!r}: unknown fault; choose from {', '.join(names)}")
    asked = [fault for fault in FAULTS if not only or fault.name in only]
    reasons = {fault: unavailable(fault, world_size) for fault in asked}
    left_out = [f"Left out: {fault.name}, {reason}." for fault, reason in reasons.items() if reason]
    able = [fault for fault, reason in reasons.items() if not reason]
    if not able:
        raise ConfigError(f"--only {', '.join(only or names)}: nothing can be made here; {' '.join(left_out)}")
    return able, left_out


def prepare(options: argparse.Namespace, overrides: list[str]) -> Launch:
    """Check the options and make the folder.

    Raises:
        ConfigError: one of them cannot be.
    """
    for name in ("num_faults", "nproc_per_node", "train_timeout_seconds", "save_every_n_steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.keep_last_n_checkpoints < 2:
        raise ConfigError(
            f"--keep_last_n_checkpoints {options.keep_last_n_checkpoints}: a damaged checkpoint needs an earlier one; "
            "keep at least 2"
        )
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"{override}: not an option of this command, nor key=value; see --help")
    if options.config is not None and not options.config.is_file():
        raise ConfigError(f"--config {options.config}: no such file")
    if options.document is not None:
        report.check_document(options.document)
    folder: Path = options.output_dir.resolve()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--output_dir {options.output_dir}: is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    config = options.config.resolve() if options.config else write_stories_run(folder / "tiny")
    own = [
        f"save_every_n_steps={options.save_every_n_steps}",
        f"keep_last_n_checkpoints={options.keep_last_n_checkpoints}",
        "log_every_n_steps=1",  # steps are counted in the record
        "resume=auto",
        f"train_timeout_seconds={options.train_timeout_seconds}",
    ]
    return Launch(options.launcher, config, options.nproc_per_node, (*overrides, *own))


def run(options: argparse.Namespace, overrides: list[str]) -> list[Outcome]:
    """All of it; prints as it goes, and leaves ``faults.md`` and ``faults.json`` in the output folder.

    Raises:
        ConfigError: bad input.
        UndisturbedRunFailed: nothing could be disturbed.
    """
    faults, notes = possible(options.only, options.nproc_per_node)
    launch = prepare(options, overrides)
    folder: Path = options.output_dir.resolve()
    baseline = undisturbed(launch, folder / "undisturbed", options.limit or 3600.0)
    notes.insert(0, _about(baseline))
    print("\n".join(notes), flush=True)
    # A frozen or lost peer takes the timeout to be noticed, and as long again to be given up by its launcher.
    limit = options.limit or 60.0 + 5.0 * baseline.seconds + 2.0 * options.train_timeout_seconds
    outcomes = []
    for number, fault in enumerate(choose(options.num_faults, options.seed, faults), start=1):
        outcome = disturb(
            fault(),
            launch,
            baseline,
            folder / f"fault-{number}",
            seed=f"{options.seed}-{number}",
            keep_last_n=options.keep_last_n_checkpoints,
            limit=limit,
        )
        outcomes.append(outcome)
        print(report.terminal_lines(number, outcome), flush=True)
        table = report.markdown(outcomes, _command(), notes)
        (folder / "faults.md").write_text(table)
        (folder / "faults.json").write_text(report.as_json(outcomes, {"command": _command(), "notes": notes}))
    if options.document is not None:
        report.put_into(options.document, table)
    print(f"{report.summary(outcomes)}\n{folder / 'faults.md'}, {folder / 'faults.json'}")
    return outcomes


def _about(baseline: Baseline) -> str:
    loss = baseline.losses[baseline.steps]
    return f"Undisturbed: {baseline.steps} steps in {baseline.seconds:.0f} s, loss {loss:.6f} at the end."


def _command() -> str:
    return shlex.join(["python", "-m", "lrdint_tune.faults", *sys.argv[1:]])


def tidy_up_on_signals() -> None:
    """Make a signal end this process through its ``finally`` blocks: processes, mounts and namespaces must go."""

    def stop(number: int, frame: object) -> NoReturn:
        for again in _SIGNALS:  # one is enough
            signal.signal(again, signal.SIG_IGN)
        print(f"{signal.Signals(number).name}: tidying up", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    for number in _SIGNALS:
        signal.signal(number, stop)


def main() -> int:
    """The command; returns its exit code."""
    tidy_up_on_signals()
    try:
        outcomes = run(*parse(sys.argv[1:]))
    except ReportedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return FAILED if any(outcome.problems for outcome in outcomes) else DONE


if __name__ == "__main__":
    sys.exit(main())
