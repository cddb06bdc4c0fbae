"""Does the literal DINT's lower loss survive when each token is predicted from its prefix alone?

    python recipes/reproduce/leak.py --preset stories260k --data_dir DATA --seeds 0 1 2
    python recipes/reproduce/leak.py --preset letters --seeds 0 1 2
    python recipes/reproduce/leak.py --preset smollm2_135m --data_dir DATA
    torchrun --nproc_per_node 8 recipes/reproduce/leak.py --preset llama3_2_1b

Runs `none`, causal `dint` and `dint` as printed (`integral: sequence`) at N = 64 and N = 256, at equal data, and predicts
held-out and training tokens both teacher-forced and prefix-wise along the run. Finished runs are not repeated.
"""

from collections.abc import Iterator

from lrdint_tune.reproduce.runs import Experiment, Run, command_line

VARIANTS = {
    "none": {"model.method": "none"},
    "dint": {"model.method": "dint"},
    "literal": {"model.method": "dint", "model.integral": "sequence", "model.allow_future_leak": True},
}
TOKENS_PER_STEP = {"smollm2_135m": 512}  # 1024 otherwise
STEPS = {"smollm2_135m": {64: 150, 256: 75}}  # as the preset says otherwise
# Positions predicted from their prefix alone: many where there can be a difference.
POSITIONS = {"stories260k": (1024, 256), "letters": (512, 128), "smollm2_135m": (192, 32)}


def runs(preset: str) -> Iterator[Run]:
    many, few = POSITIONS.get(preset, (1024, 256))
    for n in (64, 256):
        rows = TOKENS_PER_STEP.get(preset, 1024) // n
        for name, changes in VARIANTS.items():
            shape = {"max_seq_len": n, "batch_size": rows, "global_batch_size": rows}
            if preset in STEPS:
                shape["max_steps_per_epoch"] = STEPS[preset][n]
            positions = {"prefix_wise_positions": many if name == "literal" else few}
            rate = {} if name == "none" else {"lam_lr": 1.0e-2}
            yield Run(f"{name}-n{n}", {**changes, **shape, **positions, **rate})


if __name__ == "__main__":
    command_line(Experiment("leak", runs), __doc__)
