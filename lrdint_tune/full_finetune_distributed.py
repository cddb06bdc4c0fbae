"""Fine-tune a pretrained Llama with differential attention, on one process or on many.

    tune run lrdint_tune/full_finetune_distributed --config configs/quickstart.yaml
    tune run --nproc_per_node 2 lrdint_tune/full_finetune_distributed --config configs/quickstart.yaml
    torchrun --nproc_per_node 8 -m lrdint_tune.full_finetune_distributed --config configs/llama3_2_1b_dint.yaml

Exit codes: lrdint_tune/exit_codes.py.
"""

from __future__ import annotations

import logging
import os
import sys

from omegaconf import DictConfig
from torch.distributed.checkpoint import CheckpointException
from torchtune import config

from lrdint_tune.errors import ConfigError
from lrdint_tune.exit_codes import BAD_INPUT, CRASH, DONE, NONFINITE
from lrdint_tune.training.config import load_config
from lrdint_tune.training.heartbeat import Heartbeat
from lrdint_tune.training.interruption import Interruption, Stopped
from lrdint_tune.training.nonfinite import NonFiniteLossError
from lrdint_tune.training.pulse import Pulse
from lrdint_tune.training.trainer import Trainer
from lrdint_tune.training.world import end_world, start_world


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from a config file and ``key=value`` overrides; returns the process's exit code."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING, format="%(message)s", stream=sys.stderr, force=True
    )
    interruption, pulse = Interruption(), Pulse()
    heartbeat = Heartbeat(pulse)
    interruption.install(before_exit=heartbeat.yield_to_others)
    code = CRASH
    try:
        checked = load_config(cfg)
        world = start_world(checked.device, **checked.mesh_dims)
        heartbeat.start(checked.train_timeout_seconds)
        Trainer(checked, world, interruption=interruption, pulse=pulse).train()
        code = DONE
    except Stopped as stop:
        code = stop.exit_code
    except (ConfigError, NonFiniteLossError) as error:
        # Rank 0 for everybody; for what is wrong on another machine only (a missing file), its first process.
        if is_main or os.environ.get("LOCAL_RANK") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = BAD_INPUT if isinstance(error, ConfigError) else NONFINITE
    except (RuntimeError, CheckpointException):
        heartbeat.blame_others()
        raise
    finally:
        interruption.ignore()  # torchrun's SIGTERM, sent when another rank has ended, must not change the code
        heartbeat.leave(code)
        end_world()
    return code


if __name__ == "__main__":
    sys.exit(recipe_main())
