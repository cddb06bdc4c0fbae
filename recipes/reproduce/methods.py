"""Every method and every control at equal steps and data.

    python recipes/reproduce/methods.py --preset stories260k --data_dir DATA --seeds 0 1 2
    python recipes/reproduce/methods.py --preset smollm2_135m --data_dir DATA
    torchrun --nproc_per_node 8 recipes/reproduce/methods.py --preset llama3_2_1b

Held-out NLL (per document, for paired differences), NLL on other data (forgetting), trainable parameters, final λ.
Finished runs are not repeated. recipes/reproduce/step_times.py times the same models side by side.
"""

from collections.abc import Iterator

from lrdint_tune.reproduce.gate import registered
from lrdint_tune.reproduce.runs import Experiment, Run, command_line

METHODS = ("none", "dint", "diff", "daa", "dex", "diffq", "diffk", "diffv", "difflora", "lmam")
GATED = ("dint", "diff")  # with a λ of each token too
# The rank at which LoRA on q_proj and v_proj has as many parameters as DINT of rank 8 (to 0.6 %).
LORA_RANK = {"stories260k": 31, "smollm2_135m": 32, "llama3_2_1b": 101}


def runs(preset: str) -> Iterator[Run]:
    """Its ``control_gate`` can be built where :func:`~lrdint_tune.reproduce.gate.registered` is entered."""
    for method in METHODS:
        yield Run(method, {"model.method": method}, keep=True)
    for method in GATED:
        yield Run(f"{method}_gated", {"model.method": method, "model.lam": "gated"}, keep=True)
    yield Run("control_gate", {"model.method": "gate"})
    dint = {"model.method": "dint"}
    yield Run("control_full", {"trainable": ["all"]})
    rank = LORA_RANK[preset]
    lora = {"type": "lora", "target_modules": ["q_proj", "v_proj"], "rank": rank, "lora_alpha": 2 * rank}
    yield Run("control_lora", {"model.adapters": [lora], "trainable": ["adapter"]})
    yield Run("control_dint_adapter", {**dint, "trainable": ["adapter"]})
    yield Run("control_lambda_zero", {**dint, "model.lam": "fixed", "model.lam_init": 0.0})
    yield Run("control_sign_flipped", {**dint, "model.lam": "annealed", "model.lam_init": -0.8})
    yield Run("control_additive", {**dint, "model.combine": "add"})


if __name__ == "__main__":
    with registered():
        command_line(Experiment("methods", runs), __doc__)
