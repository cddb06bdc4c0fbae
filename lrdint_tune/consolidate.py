"""A checkpoint of a run as an adapter folder and a Hugging Face folder, without the run: no GPU, no process group.

    tune run lrdint_tune/consolidate --config configs/consolidate.yaml checkpoint=output/run output_dir=output/step
    python -m lrdint_tune.consolidate --config configs/consolidate.yaml checkpoint=output/run/checkpoints/step-500 ...

One whole tensor is held in memory at a time. Exit codes: lrdint_tune/exit_codes.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from lrdint_tune.entry import recipe
from lrdint_tune.exit_codes import DONE
from lrdint_tune.training.checkpoint.consolidation import consolidate
from lrdint_tune.training.config import load_config


@dataclass(frozen=True)
class ConsolidateConfig:
    """The keys of configs/consolidate.yaml.

    Attributes:
        checkpoint: a ``step-N`` folder, or a run's output folder for its latest good checkpoint.
        output_dir: where ``adapter`` and ``hf`` are written.
        checkpoint_dir: the pretrained weights, if they are no longer where the run found them.
    """

    checkpoint: str
    output_dir: str
    checkpoint_dir: str | None = None


@recipe()
def recipe_main(cfg: DictConfig) -> int:
    """Consolidate the checkpoint that a config file with ``key=value`` overrides names; returns the exit code."""
    options = load_config(cfg, ConsolidateConfig)
    consolidate(Path(options.checkpoint), Path(options.output_dir), checkpoint_dir=options.checkpoint_dir)
    return DONE


if __name__ == "__main__":
    sys.exit(recipe_main())
