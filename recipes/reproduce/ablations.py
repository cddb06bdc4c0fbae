"""Ablations of low-rank DINT and of LMAM, one setting changed at a time.

    python recipes/reproduce/ablations.py --preset stories260k --data_dir DATA --seeds 0 1 2
    python recipes/reproduce/ablations.py --preset smollm2_135m --data_dir DATA
    torchrun --nproc_per_node 8 recipes/reproduce/ablations.py --preset llama3_2_1b

Compared with the runs of `methods.py` that differ in that setting alone: `dint` (the default), `lmam`; DINT without its
integral is `diff` there, with a λ of each token `dint_gated`. Finished runs are not repeated.
"""

from collections.abc import Iterator
from typing import Any

from lrdint_tune.reproduce.runs import Experiment, Run, command_line

RANKS = {"stories260k": (1, 2, 4)}  # 8 is the default and this model's head dim; larger ones elsewhere
LARGER_RANKS = (1, 4, 16, 64)
DINT: dict[str, dict[str, Any]] = {
    "scale-variance": {"secondary_scale": "variance"},
    "scale-standard": {"secondary_scale": "standard"},
    "lam-annealed-0.2": {"lam": "annealed", "lam_init": 0.2},
    "lam-annealed-0.5": {"lam": "annealed", "lam_init": 0.5},
    "lam-annealed-0.8": {"lam": "annealed", "lam_init": 0.8},
    "lam-exponential": {"lam": "exponential"},
    "lam-sigmoid": {"lam": "sigmoid"},
    "lam-sigmoid-add": {"lam": "sigmoid", "combine": "add"},
    "lam-gated-add": {"lam": "gated", "combine": "add"},
    "lam-fixed-0.1": {"lam": "fixed", "lam_init": 0.1},
    "factors-shared": {"factors": "shared"},
    "noise-heads-kv": {"noise_heads": "kv"},
    "secondary-keys-shared": {"secondary_keys": "shared"},
    "full-rank": {"rank": None},
}
# Seed 004 Table 9.
LMAM: dict[str, dict[str, Any]] = {
    "lmam-not-N": {"inside_softmax": True},
    "lmam-not-S": {"softmax_map": True},
    "lmam-not-L": {"full_rank": True},
    "lmam-not-P": {"position": "none"},
}
# What a machine of two cores can decide on a real model; the cluster's presets run everything.
FEW = {
    "smollm2_135m": (
        "scale-variance scale-standard lam-annealed-0.2 lam-annealed-0.8 lam-sigmoid lam-sigmoid-add "
        "lam-gated-add factors-shared rank-1 rank-4 rank-64"
    ).split()
}


def runs(preset: str) -> Iterator[Run]:
    options = {**DINT, **{f"rank-{r}": {"rank": r} for r in RANKS.get(preset, LARGER_RANKS)}}
    cells = {name: {"method": "dint", **changed} for name, changed in options.items()}
    cells |= {name: {"method": "lmam", **changed} for name, changed in LMAM.items()}
    for name, model in cells.items():
        if name in FEW.get(preset, cells):
            yield Run(name, {f"model.{key}": value for key, value in model.items()})


if __name__ == "__main__":
    command_line(Experiment("ablations", runs), __doc__)
