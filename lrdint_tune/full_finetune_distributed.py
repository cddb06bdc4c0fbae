"""Fine-tune a pretrained Llama with differential attention, on one process or on many.

    tune run lrdint_tune/full_finetune_distributed --config configs/quickstart.yaml
    tune run --nproc_per_node 2 lrdint_tune/full_finetune_distributed --config configs/quickstart.yaml
    torchrun --nproc_per_node 8 -m lrdint_tune.full_finetune_distributed --config configs/llama3_2_1b_dint.yaml

Exit codes: lrdint_tune/exit_codes.py.
"""

from __future__ import annotations

import sys
import traceback
from functools import partial
from typing import NoReturn

from omegaconf import DictConfig
from torch.distributed.checkpoint import CheckpointException

from lrdint_tune.ending import end_now, report, tells
from lrdint_tune.entry import recipe
from lrdint_tune.errors import ReportedError
from lrdint_tune.exit_codes import CRASH, DONE
from lrdint_tune.training.config import load_config
from lrdint_tune.training.heartbeat import Heartbeat
from lrdint_tune.training.interruption import Interruption, Stopped
from lrdint_tune.training.preflight import preflight
from lrdint_tune.training.pulse import Pulse
from lrdint_tune.training.trainer import Trainer
from lrdint_tune.training.world import end_world, start_world


@recipe()
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from a config file and ``key=value`` overrides; returns the process's exit code."""
    interruption, pulse = Interruption(), Pulse()
    heartbeat = Heartbeat(pulse)
    interruption.install(before_exit=heartbeat.yield_to_others)
    try:
        checked = load_config(cfg)
        world = start_world(
            checked.device,
            partial(preflight, checked),
            **checked.mesh_dims,
            init_timeout_seconds=checked.init_timeout_seconds,
        )
        heartbeat.start(checked.train_timeout_seconds)
        Trainer(checked, world, interruption=interruption, pulse=pulse).train()
        code = DONE
    except Stopped as stop:
        code = stop.exit_code
    except (Exception, CheckpointException) as error:  # torch derives the second from BaseException
        if isinstance(error, RuntimeError | CheckpointException):
            heartbeat.blame_others()
        interruption.ignore()
        _fail(error, heartbeat)
    # All ranks come here together.
    interruption.ignore()  # torchrun's SIGTERM, sent when another rank has ended, must not change the code
    heartbeat.leave(code)
    end_world()
    return code


def _fail(error: BaseException, heartbeat: Heartbeat) -> NoReturn:
    """End, without the others: they may be inside a collective that this rank does not join."""
    if isinstance(error, ReportedError):
        heartbeat.leave(error.exit_code, "" if tells() else str(error))
        report(error)
        end_now(error.exit_code)
    traceback.print_exception(error)
    heartbeat.leave(CRASH)
    end_now(CRASH)


if __name__ == "__main__":
    sys.exit(recipe_main())
