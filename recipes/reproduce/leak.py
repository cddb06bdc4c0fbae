"""Does the literal DINT's lower loss survive when each token is predicted from its prefix alone?

    python recipes/reproduce/leak.py --preset stories260k --data_dir DATA --seeds 0 1 2
    python recipes/reproduce/leak.py --preset letters --seeds 0 1 2
    python recipes/reproduce/leak.py --preset smollm2_135m --data_dir DATA
    torchrun --nproc_per_node 8 recipes/reproduce/leak.py --preset llama3_2_1b

Runs `none`, causal `dint` and `dint` as printed (`integral: sequence`) at N = 64 and N = 256 (letters: N = 8 too), at
equal data, and predicts held-out and training tokens both teacher-forced and prefix-wise along the run. Finished runs
are not repeated.
"""

from collections.abc import Iterator

from lrdint_tune.reproduce.runs import Experiment, Run, command_line

VARIANTS = {
    "none": {"model.method": "none"},
    "dint": {"model.method": "dint"},
    "literal": {"model.method": "dint", "model.integral": "sequence", "model.allow_future_leak": True},
}
# By preset: sequence lengths, tokens a step, ranks, steps, and positions that are predicted from their prefix alone (of
# the literal form; of the others, which have no difference to show). What is missing is as for stories260k.
LENGTHS = {"letters": (8, 64, 256)}
TOKENS_PER_STEP = {"smollm2_135m": 256, "llama3_2_1b": 32_768}
RANKS = {"llama3_2_1b": 64}  # so many can share a step, or a divisor of it
STEPS = {"smollm2_135m": {64: 100, 256: 30}, "letters": {8: 600, 64: 2000, 256: 2000}}
POSITIONS = {"letters": (512, 128), "smollm2_135m": (96, 32)}


def runs(preset: str) -> Iterator[Run]:
    many, few = POSITIONS.get(preset, (1024, 256))
    for n in LENGTHS.get(preset, (64, 256)):
        rows = TOKENS_PER_STEP.get(preset, 1024) // n
        for name, changes in VARIANTS.items():
            batch = rows // RANKS.get(preset, 1)
            settings = {"max_seq_len": n, "batch_size": batch, "global_batch_size": rows}
            if steps := STEPS.get(preset, {}).get(n):
                settings |= {"max_steps_per_epoch": steps, "run_val_every_n_steps": steps // (2 if n == 256 else 4)}
            settings["prefix_wise_positions"] = many if name == "literal" else few
            if name != "none":
                settings["lam_lr"] = 1.0e-2  # so that λ gets somewhere in few steps
            yield Run(f"{name}-n{n}", {**changes, **settings})


if __name__ == "__main__":
    command_line(Experiment("leak", runs), __doc__)
