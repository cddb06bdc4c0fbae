"""Who sees the future? Change the tokens from position t on and look at what happens before t.

    python -m benchmarks.perturbation --checkpoint-dir quickstart_output/model --out docs/perturbation.png

Loads SmolLM2-135M, sets every λ to 0.2 and compares the logits of a text with those of the same text whose second half
was replaced. A causal model answers the first half exactly alike.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from lrdint_tune.models import LlamaDecoder, smollm2_135m
from lrdint_tune.models.hf import iter_hf_folder

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "diff": {"method": "diff"},
    "dint, integral: causal": {"method": "dint"},
    "dint, integral: sequence (as printed)": {"method": "dint", "integral": "sequence", "allow_future_leak": True},
}


def load(folder: Path, lam: float, **options: Any) -> LlamaDecoder:
    """SmolLM2-135M with random secondary projections and every λ at ``lam``."""
    torch.manual_seed(0)
    model = smollm2_135m(**options)
    state = dict(iter_hf_folder(folder, model.spec))
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            if name.endswith("lam.value"):
                parameter.fill_(lam)
    return model


@torch.no_grad()
def change_per_position(model: LlamaDecoder, tokens: torch.Tensor, t: int) -> torch.Tensor:
    """Largest change of a logit at each position, float32 ``[N]``, when the tokens from ``t`` on are replaced."""
    other = tokens.clone()
    generator = torch.Generator().manual_seed(1)
    other[:, t:] = torch.randint(0, model.spec.vocab_size, (1, tokens.shape[1] - t), generator=generator)
    return (model(tokens) - model(other)).abs().amax(-1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("quickstart_output/model"))
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lam", type=float, default=0.2)
    parser.add_argument("--out", type=Path, help="write a figure here (needs matplotlib)")
    args = parser.parse_args()
    t = args.length // 2
    tokens = torch.randint(0, 49_152, (1, args.length), generator=torch.Generator().manual_seed(2))
    curves = {
        name: change_per_position(load(args.checkpoint_dir, args.lam, **options), tokens, t)
        for name, options in VARIANTS.items()
    }
    for name, curve in curves.items():
        print(
            json.dumps(
                {
                    "variant": name,
                    "max_change_before_t": curve[:t].max().item(),
                    "max_change_from_t": curve[t:].max().item(),
                }
            )
        )
    if args.out:
        draw(curves, t, args.out)


def draw(curves: dict[str, torch.Tensor], t: int, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    colors = {"dint, integral: causal": "tab:blue", "dint, integral: sequence (as printed)": "tab:red"}
    halves = {f"before the change (positions < {t})": slice(0, t), "from the change on": slice(t, None)}
    for axis, (title, half) in zip(axes, halves.items(), strict=True):
        for name, color in colors.items():
            curve = curves[name]
            axis.plot(range(len(curve))[half], curve[half], color=color, label=name, linewidth=1.8)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("position")
    axes[0].set_ylabel("largest change of a logit")
    axes[0].set_ylim(top=axes[0].get_ylim()[1] * 1.35)
    axes[0].legend(frameon=False, loc="upper left", fontsize=8)
    fig.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
