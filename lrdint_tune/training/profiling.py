"""A profile of a few steps, as traces that TensorBoard, Perfetto and chrome://tracing open."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from lrdint_tune.errors import ConfigError
from lrdint_tune.options import flag, positive_int
from lrdint_tune.training.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProfilerOptions:
    """The keys of the ``profiler`` section, named as torchtune names them.

    Attributes:
        enabled: whether there is a profile at all.
        output_dir: where the traces go; None: into TensorBoard's folder.
        cpu: record what the CPU does.
        cuda: record kernels; None: where the run is on CUDA.
        profile_memory: record allocations.
        with_stack: record the lines of source code.
        record_shapes: record the shapes of inputs.
        with_flops: count the operations of matrix products.
        wait_steps: steps without profiler, at the start of each cycle.
        warmup_steps: steps with it whose record is thrown away: starting it costs time.
        active_steps: steps recorded.
        num_cycles: how often all that is done; one trace each.
    """

    enabled: bool = False
    output_dir: str | None = None
    cpu: bool = True
    cuda: bool | None = None
    profile_memory: bool = False
    with_stack: bool = False
    record_shapes: bool = True
    with_flops: bool = False
    wait_steps: int = 5
    warmup_steps: int = 5
    active_steps: int = 2
    num_cycles: int = 1

    def __post_init__(self) -> None:
        for key in ("enabled", "cpu", "profile_memory", "with_stack", "record_shapes", "with_flops"):
            flag(f"profiler.{key}", getattr(self, key))
        if self.cuda is not None:
            flag("profiler.cuda", self.cuda)
        if self.output_dir is not None and not isinstance(self.output_dir, str):
            raise ConfigError(f"profiler.output_dir={self.output_dir!r}: must be a path")
        for key in ("wait_steps", "warmup_steps"):
            value = getattr(self, key)
            if value != 0 or isinstance(value, bool):
                positive_int(f"profiler.{key}", value, ", or 0")
        for key in ("active_steps", "num_cycles"):
            positive_int(f"profiler.{key}", getattr(self, key))
        if not self.cpu and self.cuda is False:
            raise ConfigError("profiler.cpu=false: with cuda=false nothing is recorded; set one of them to true")

    @property
    def cycle(self) -> int:
        """Steps until the first trace is there."""
        return self.wait_steps + self.warmup_steps + self.active_steps


def check_profiler(section: dict[str, Any] | None) -> ProfilerOptions:
    """The options that a ``profiler`` section gives; no section, no profile.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    section = section or {}
    valid = [f.name for f in fields(ProfilerOptions)]
    for key in section:
        if key not in valid:
            raise ConfigError(f"profiler: unknown key {key}={section[key]!r}; valid keys: {', '.join(valid)}")
    return ProfilerOptions(**section)


class ProfilerWindow:
    """torch.profiler over a window of the training steps; without ``enabled`` nothing at all.

    Args:
        section: the ``profiler`` section of the config.
        log_dir: TensorBoard's folder; its profiler plugin finds traces anywhere below.
        world: one trace per rank and cycle, ``rank0.<time>.pt.trace.json``.
        total_steps: of the whole run.

    Raises:
        ConfigError: bad options, CUDA asked for on a CPU, or a window that the run never reaches the end of.
    """

    def __init__(self, section: dict[str, Any] | None, log_dir: Path, world: World, total_steps: int) -> None:
        self.options = check_profiler(section)
        self.folder = Path(self.options.output_dir or log_dir / "plugins" / "profile")
        self.world = world
        self._profile: profile | None = None
        if not self.options.enabled:
            return
        on_cuda = world.device.type == "cuda"
        if self.options.cuda and not on_cuda:
            raise ConfigError(f"profiler.cuda=true: this run is on {world.device.type}; remove it")
        if not self.options.cpu and not on_cuda:
            raise ConfigError("profiler.cpu=false: nothing else can be recorded on a CPU; set it to true")
        if self.options.cycle > total_steps:
            raise ConfigError(
                f"profiler.active_steps={self.options.active_steps}: the window ends after wait_steps + warmup_steps + "
                f"active_steps = {self.options.cycle} steps, the run after {total_steps}; lower them"
            )

    def start(self, steps_left: int) -> None:
        """Begin counting steps, of which ``steps_left`` are to come."""
        options = self.options
        if not options.enabled:
            return
        if options.cycle > steps_left:
            log.warning("profiler: no effect, %d steps are left and its window needs %d", steps_left, options.cycle)
            return
        activities = [ProfilerActivity.CPU] if options.cpu else []
        if self.world.device.type == "cuda" and options.cuda is not False:
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(
                wait=options.wait_steps,
                warmup=options.warmup_steps,
                active=options.active_steps,
                repeat=options.num_cycles,
            ),
            on_trace_ready=tensorboard_trace_handler(str(self.folder), worker_name=f"rank{self.world.rank}"),
            record_shapes=options.record_shapes,
            profile_memory=options.profile_memory,
            with_stack=options.with_stack,
            with_flops=options.with_flops,
        )
        self._profile.start()
        if self.world.is_main:
            log.info("profiler: traces of each rank go to %s", self.folder)

    def step(self) -> None:
        """An optimizer step, with all that followed from it, is over."""
        if self._profile is not None:
            self._profile.step()

    def stop(self) -> None:
        """End it, wherever in its window."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
