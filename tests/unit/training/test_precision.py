"""Formats of parameters on one process; sharded ones are tested in tests/distributed."""

import torch

from lrdint_tune.training.precision import set_precision
from lrdint_tune.training.trainable import set_trainable
from tests.common.tiny_run import tiny_dint


def test_only_frozen_parameters_become_bf16() -> None:
    model = tiny_dint("meta")
    set_trainable(model, ["adapter", "norms"])
    set_precision(model, "bf16")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    untouched = tiny_dint("meta")
    set_trainable(untouched, ["adapter"])
    set_precision(untouched, "fp32")
    assert all(p.dtype == torch.float32 for p in untouched.parameters())


def test_a_frozen_lambda_stays_float32() -> None:
    model = tiny_dint()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    set_precision(model, "bf16")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert all((dtype == torch.float32) == (".lam." in name) for name, dtype in dtypes.items())
