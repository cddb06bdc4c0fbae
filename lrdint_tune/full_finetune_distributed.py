"""Fine-tune a pretrained Llama with differential attention, on one process or on many.

    tune run lrdint_tune/full_finetune_distributed --config configs/quickstart.yaml
    tune run --nproc_per_node 2 lrdint_tune/full_finetune_distributed --config configs/quickstart.yaml
    torchrun --nproc_per_node 8 -m lrdint_tune.full_finetune_distributed --config configs/llama3_2_1b_dint.yaml

Exit codes: 0 done, 2 bad input, 3 NaN or infinite loss, 6 processes that cannot reach each other.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial

from omegaconf import DictConfig
from torchtune import config

from lrdint_tune.errors import ConfigError, UnreachableError
from lrdint_tune.exit_codes import BAD_INPUT, LOST_RANK, NONFINITE
from lrdint_tune.training.config import load_config
from lrdint_tune.training.nonfinite import NonFiniteLossError
from lrdint_tune.training.preflight import preflight
from lrdint_tune.training.trainer import Trainer
from lrdint_tune.training.world import end_world, start_world


@config.parse
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from a config file and ``key=value`` overrides; returns the process's exit code."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING, format="%(message)s", stream=sys.stderr, force=True
    )
    try:
        checked = load_config(cfg)
        world = start_world(
            checked.device,
            partial(preflight, checked),
            **checked.mesh_dims,
            init_timeout_seconds=checked.init_timeout_seconds,
        )
        Trainer(checked, world).train()
    except (ConfigError, NonFiniteLossError, UnreachableError) as error:
        # Rank 0 for everybody; for what is wrong on another machine only (a missing file), its first process.
        if is_main or os.environ.get("LOCAL_RANK") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, UnreachableError):
            return LOST_RANK
        return BAD_INPUT if isinstance(error, ConfigError) else NONFINITE
    finally:
        end_world()
    return 0


if __name__ == "__main__":
    sys.exit(recipe_main())
