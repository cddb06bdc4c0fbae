"""The methods that need no keys of their own, on ``transformers`` models.

model = GPT2LMHeadModel.from_pretrained("gpt2")
attach(model, "daa", anneal_steps=1000)
set_trainable(model, ["adapter"])
...                                     # every optimizer step: advance_schedule(model, step)
save(model, "out/adapter")
load(GPT2LMHeadModel.from_pretrained("gpt2"), "out/adapter")
"""

from lrdint_tune.hosts.architectures import ARCHITECTURES
from lrdint_tune.hosts.attach import SUPPORTED, attach
from lrdint_tune.hosts.model import (
    TRAINABLE_GROUPS,
    advance_schedule,
    calibrate,
    diagnostics,
    enable_diagnostics,
    method_parameters,
    methods,
    set_trainable,
)
from lrdint_tune.hosts.pretrained import from_pretrained
from lrdint_tune.hosts.saving import load, save

__all__ = [
    "ARCHITECTURES",
    "SUPPORTED",
    "TRAINABLE_GROUPS",
    "advance_schedule",
    "attach",
    "calibrate",
    "diagnostics",
    "enable_diagnostics",
    "from_pretrained",
    "load",
    "method_parameters",
    "methods",
    "save",
    "set_trainable",
]
