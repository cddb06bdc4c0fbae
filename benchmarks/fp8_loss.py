"""Does training in fp8 follow training in bf16? The loss of every step of both, from the same weights, data and seed.

    python benchmarks/fp8_loss.py --config configs/quickstart.yaml --steps 50 --fp8 tensorwise rowwise

after ``make quickstart`` or ``python -m lrdint_tune.quickstart.prepare``. Further ``key=value`` arguments override the
config, as in the recipe. Without a GPU that has fp8 products they are emulated, which rounds alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run by its path, uninstalled

from lrdint_tune.training.config import load_config  # noqa: E402
from lrdint_tune.training.precision import FP8_RECIPES  # noqa: E402
from lrdint_tune.training.trainer import Trainer  # noqa: E402
from lrdint_tune.training.world import end_world, start_world  # noqa: E402


def losses(config: dict[str, Any], steps: int) -> list[float]:
    """Loss per token of each of ``steps`` optimizer steps, in nats; nothing is left behind but the data cache.

    Raises:
        ConfigError: as the recipe does.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config({**config, "output_dir": folder, "max_steps_per_epoch": steps})
        world = start_world(cfg.device, **cfg.mesh_dims)
        trainer = Trainer(cfg, world)
        found: list[float] = []
        while len(found) < min(steps, trainer.total_steps):
            values, *_ = trainer._train_step(logging_step=False)
            found.append(values["loss_metrics/global_avg_loss"])
            print(f"{cfg.fp8} step {len(found)}: {found[-1]:.4f}", file=sys.stderr, flush=True)
        trainer.checkpoints.close()
    return found


def compare(config: dict[str, Any], recipes: Sequence[str], steps: int) -> dict[str, list[float]]:
    """The losses without fp8 (``none``) and with each of ``recipes``, all else equal."""
    return {recipe: losses({**config, "fp8": recipe}, steps) for recipe in ("none", *recipes)}


def differences(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """recipe -> |loss with it - loss without| of every step."""
    return {
        recipe: [abs(a - b) for a, b in zip(values, found["none"], strict=True)]
        for recipe, values in found.items()
        if recipe != "none"
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml", help="a config of the recipe")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--fp8", nargs="+", choices=FP8_RECIPES[1:], default=["tensorwise"])
    parser.add_argument("--threads", type=int, help="CPU threads")
    options, overrides = parser.parse_known_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    merged = OmegaConf.merge(
        OmegaConf.load(options.config), {"dtype": "bf16", "dataset_val": None}, OmegaConf.from_dotlist(overrides)
    )
    config = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(config, dict)
    found = compare({str(key): value for key, value in config.items()}, options.fp8, options.steps)
    end_world()
    count = len(found["none"])
    print(f"{options.config}, {count} steps, loss without fp8 {found['none'][0]:.4f} -> {found['none'][-1]:.4f}")
    print(f"{'fp8':<20}{'last loss':>10}{'mean |Δ|':>10}{'max |Δ|':>10}")
    for recipe, values in differences(found).items():
        print(f"{recipe:<20}{found[recipe][-1]:>10.4f}{statistics.mean(values):>10.4f}{max(values):>10.4f}")


if __name__ == "__main__":
    main()
