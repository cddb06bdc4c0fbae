"""Fine-tune a pretrained Llama with differential attention, on one process or on many.

    tune run lrdint_tune/full_finetune_distributed --config configs/quickstart.yaml
    tune run --nproc_per_node 2 lrdint_tune/full_finetune_distributed --config configs/quickstart.yaml
    torchrun --nproc_per_node 8 -m lrdint_tune.full_finetune_distributed --config configs/llama3_2_1b_dint.yaml

Exit codes: lrdint_tune/exit_codes.py.
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from lrdint_tune.entry import recipe
from lrdint_tune.training.config import load_config
from lrdint_tune.training.job import Job
from lrdint_tune.training.trainer import Trainer


@recipe()
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from a config file and ``key=value`` overrides; returns the process's exit code."""
    job = Job()

    def train() -> None:
        checked = load_config(cfg)
        world = job.start_world(checked)
        Trainer(checked, world, interruption=job.interruption, pulse=job.pulse).train()

    return job.run(train)


if __name__ == "__main__":
    sys.exit(recipe_main())
