"""What a run will need before it is rented: memory, FLOPs, communication and time, from its config alone.

    tune run lrdint_tune/plan --config configs/llama3_1_70b_dint.yaml world_size=512 gpu=h100
    python -m lrdint_tune.plan --config configs/llama3_1_8b_dint.yaml world_size=8 gpu=a100 hardware.memory_gib=39.4

Keys beside the config's: world_size, gpu, hardware.*, gpus_per_node, network_gb_per_s, attainable, usable, output
(lrdint_tune/planning/options.py). Neither weights nor data nor a GPU are looked at. Everything it says is an estimate.

Exit codes: 0 it fits, or nobody knows (gpu=cpu); 2 bad input; 4 it does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lrdint_tune.entry import recipe
from lrdint_tune.errors import ConfigError
from lrdint_tune.exit_codes import DOES_NOT_FIT, DONE
from lrdint_tune.planning.advice import advise
from lrdint_tune.planning.options import PlanOptions
from lrdint_tune.planning.plan import Planner
from lrdint_tune.planning.report import as_json, as_text
from lrdint_tune.planning.skeleton import fake_world
from lrdint_tune.training.config import load_config


@recipe(log_level=logging.WARNING)
def recipe_main(cfg: DictConfig) -> int:
    """Plan a config file with ``key=value`` overrides; returns the process's exit code."""
    own = {f.name for f in dataclasses.fields(PlanOptions)}
    options = load_config(OmegaConf.masked_copy(cfg, [key for key in map(str, cfg) if key in own]), PlanOptions)
    checked = load_config(OmegaConf.masked_copy(cfg, [key for key in map(str, cfg) if key not in own]))
    with fake_world(options.world_size):
        planner = Planner(checked, options.target)
        plan = planner.evaluate(planner.knobs)
        advice = advise(planner, plan) if plan.fits is False else []
    print(as_text(plan, options.target, advice))
    if options.output is not None:
        try:
            Path(options.output).write_text(json.dumps(as_json(plan, options.target, advice), indent=1) + "\n")
        except OSError as error:
            raise ConfigError(
                f"output={options.output!r}: cannot be written ({error.strerror}); give another path"
            ) from error
    return DOES_NOT_FIT if plan.fits is False else DONE


if __name__ == "__main__":
    sys.exit(recipe_main())
