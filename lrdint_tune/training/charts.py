"""TensorBoard's custom scalars: the curves that belong together in one chart each, the layers of a model among them."""

from __future__ import annotations

import re

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import custom_scalars

# Category -> title of a chart -> its tags; a name with a slash at its end stands for one curve a layer.
ALWAYS = {
    "loss": {
        "training": ["loss_metrics/global_avg_loss"],
        "held out, teacher-forced and prefix-wise": ["validation_metrics/loss", "validation_metrics/prefix_wise_loss"],
        "leak: held out, prefix-wise minus teacher-forced": ["validation_metrics/leak"],
    },
    "throughput": {
        "tokens/s": ["throughput(tps)"],
        "seconds a step": ["time_metrics/end_to_end(s)", "time_metrics/data_loading(s)"],
        "TFLOP/s a device": ["tflops", "tflops_causal"],
    },
    "gradients": {"norm of all": ["grad_norm"]},
}
OF_A_METHOD = {
    "λ per layer": {
        "mean over heads": ["lambda_mean/"],
        "smallest head": ["lambda_min/"],
        "largest head": ["lambda_max/"],
    },
    "‖O2‖/‖O1‖ per layer": {"ratio of the norms": ["o2_o1_ratio/"]},
    "gradients of the new tensors per layer": {"norm": ["adapter_grad_norm/"]},
}


def layout_summary(*, method: str) -> Summary:
    """The charts of a run with that attention method. TensorBoard joins the charts of all runs that it shows."""
    categories = {**ALWAYS, **({} if method == "none" else OF_A_METHOD)}
    return custom_scalars(
        {
            category: {title: ["Multiline", [_pattern(tag) for tag in tags]] for title, tags in charts.items()}
            for category, charts in categories.items()
        }
    )


def _pattern(tag: str) -> str:
    """The regular expression of a tag, or of a tag per layer."""
    return re.escape(tag) + (r"layers\.\d+$" if tag.endswith("/") else "$")
