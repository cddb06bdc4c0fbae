"""TensorBoard's custom scalars: the curves that belong together in one chart each, the layers of a model among them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import custom_scalars

from lrdint_tune.training.config import RunConfig

# What a run records -> category -> title of a chart -> its tags; a name with a slash at its end stands for one curve a
# layer. No tag with parentheses: TensorBoard 2.21 takes what is in them for the name of a run, and draws nothing.
CHARTS: dict[str, dict[str, dict[str, list[str]]]] = {
    "loss": {
        "loss": {
            "training": ["loss_metrics/global_avg_loss"],
            "held out, teacher-forced": ["validation_metrics/loss"],
            "norm of the gradient": ["grad_norm"],
        },
    },
    "leak": {
        "leak": {
            f"{rows} rows: {what}": [f"{group}/{tag}" for tag in tags]
            for what, tags in (
                ("prefix-wise and teacher-forced", ("prefix_wise_loss", "teacher_forced_loss")),
                ("leak (the difference)", ("leak",)),
            )
            for rows, group in (("held-out", "validation_metrics"), ("training", "training_rows"))
        },
    },
    "method": {
        "λ per layer": {
            "mean over heads": ["lambda_mean/"],
            "smallest head": ["lambda_min/"],
            "largest head": ["lambda_max/"],
        },
        "‖O2‖/‖O1‖ per layer": {"ratio of norms": ["o2_o1_ratio/"]},
        "gradient of the new tensors per layer": {"norm": ["adapter_grad_norm/"]},
    },
    "attention": {
        "attention on the probe text, per layer": {
            "entropy of a row (nats)": ["attention/entropy/"],
            "share on the first token": ["attention/first_token_mass/"],
            "share of negative weights": ["attention/negative_share/"],
            "noise to signal": ["attention/noise_to_signal/"],
            "share on later tokens": ["attention/future_mass/"],
        },
    },
    "rates": {
        "throughput": {
            "tokens per second": ["throughput/tokens_per_second"],
            "seconds per step": ["throughput/seconds_per_step"],
            "TFLOP/s per device": ["tflops", "tflops_causal"],
        },
    },
}


def charts_of(cfg: RunConfig) -> list[str]:
    """The keys of ``CHARTS`` for what a run with that config records."""
    recorded = {
        "loss": True,
        "leak": getattr(cfg, "prefix_wise_positions", None) is not None,  # a key of the FSDP2 recipe alone
        "method": cfg.model.get("method", "none") != "none",
        "attention": getattr(cfg, "attention_probe", None) is not None,
        "rates": True,
    }
    return [name for name, is_recorded in recorded.items() if is_recorded]


def layout_summary(recorded: Iterable[str]) -> Summary:
    """The charts of a run that records these of ``CHARTS``. TensorBoard joins the charts of all runs that it shows."""
    return custom_scalars(
        {
            category: {title: ["Multiline", [_pattern(tag) for tag in tags]] for title, tags in charts.items()}
            for name in recorded
            for category, charts in CHARTS[name].items()
        }
    )


def _pattern(tag: str) -> str:
    """The regular expression of a tag, or of a tag per layer."""
    return re.escape(tag) + (r"layers\.\d+$" if tag.endswith("/") else "$")
