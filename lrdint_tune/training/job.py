"""A process of a training job: listens to signals, is watched by the others, and ends with the right exit code."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from torch.distributed.checkpoint import CheckpointException

from lrdint_tune.ending import end_now, report, tells
from lrdint_tune.errors import ReportedError
from lrdint_tune.exit_codes import CRASH, DONE
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.heartbeat import Heartbeat
from lrdint_tune.training.interruption import Interruption, Stopped
from lrdint_tune.training.preflight import preflight
from lrdint_tune.training.pulse import Pulse
from lrdint_tune.training.world import World, end_world, start_world


class Job:
    """Create it first of all: signals are listened to from then on.

    Attributes:
        interruption, pulse: for the :class:`~lrdint_tune.training.trainer.Trainer`.
    """

    def __init__(self) -> None:
        self.interruption, self.pulse = Interruption(), Pulse()
        self._heartbeat = Heartbeat(self.pulse)
        self.interruption.install(before_exit=self._heartbeat.yield_to_others)

    def start_world(self, cfg: TrainConfig) -> World:
        """Join the process group and watch the other ranks from now on; see
        :func:`~lrdint_tune.training.world.start_world`."""
        world = start_world(
            cfg.device,
            partial(preflight, cfg),
            **cfg.mesh_dims,
            init_timeout_seconds=cfg.init_timeout_seconds,
        )
        self._heartbeat.start(cfg.train_timeout_seconds)
        return world

    def run(self, work: Callable[[], None]) -> int:
        """Do ``work`` and return the process's exit code; a failure ends the process here, in one line."""
        try:
            work()
            code = DONE
        except Stopped as stop:
            code = stop.exit_code
        except (Exception, CheckpointException) as error:  # torch derives the second from BaseException
            if isinstance(error, RuntimeError | CheckpointException):
                self._heartbeat.blame_others()
            self.interruption.ignore()
            self._fail(error)
        # All ranks come here together.
        self.interruption.ignore()  # torchrun's SIGTERM, sent when another rank has ended, must not change the code
        self._heartbeat.leave(code)
        end_world()
        return code

    def _fail(self, error: BaseException) -> NoReturn:
        """End, without the others: they may be inside a collective that this rank does not join."""
        if isinstance(error, ReportedError):
            self._heartbeat.leave(error.exit_code, "" if tells() else str(error))
            report(error)
            end_now(error.exit_code)
        traceback.print_exception(error)
        self._heartbeat.leave(CRASH)
        end_now(CRASH)
