"""Each adapter against its formula, written out in float64, and the parameters it brings."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import FeedForward

from lrdint_tune import models
from lrdint_tune.adapters import attach
from lrdint_tune.adapters.bottleneck import Bottleneck
from lrdint_tune.adapters.lora import LoRA
from lrdint_tune.adapters.quanta import QuanTA
from tests.common.adapters import wake_adapters

CLOSE: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)


def linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False).double()


@pytest.mark.parametrize("rslora", [False, True])
def test_lora(rslora: bool) -> None:
    base, lora = linear(10, 14), LoRA(10, 14, rank=4, lora_alpha=6, use_rslora=rslora).double()
    attach(base, "lora", lora)
    wake_adapters(base, std=1.0)
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    scale = 6 / math.sqrt(4) if rslora else 6 / 4
    expected = x @ base.weight.T + scale * (x @ lora.a.weight.T @ lora.b.weight.T)
    torch.testing.assert_close(base(x), expected, **CLOSE)
    torch.testing.assert_close(lora.delta_weight(), scale * lora.b.weight @ lora.a.weight, **CLOSE)


def test_lora_dropout_is_for_training() -> None:
    lora = LoRA(10, 14, lora_dropout=0.5)
    nn.init.normal_(lora.b.weight)
    x = torch.randn(3, 10)
    assert not torch.equal(lora(x), lora(x))
    lora.eval()
    torch.testing.assert_close(lora(x), x @ lora.delta_weight().T)


def test_bottleneck() -> None:
    base = FeedForward(gate_proj=linear(10, 22), down_proj=linear(22, 10), up_proj=linear(10, 22))
    bottleneck = Bottleneck.for_module(base, rank=6, scale=3.0).double()
    attach(base, "bottleneck", bottleneck)
    wake_adapters(base, std=1.0)
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    ffn = (F.silu(x @ base.w1.weight.T) * (x @ base.w3.weight.T)) @ base.w2.weight.T
    narrow = (x @ bottleneck.down.weight.T + bottleneck.down.bias).clamp(min=0)
    expected = ffn + 3.0 * (narrow @ bottleneck.up.weight.T + bottleneck.up.bias)
    torch.testing.assert_close(base(x), expected, **CLOSE)


def factor(tensor: Tensor, i: int, j: int, dims: list[int]) -> Tensor:
    """The whole matrix of 1 + E on axes i < j of a state of shape dims."""
    total = math.prod(dims)
    matrix = torch.eye(total, dtype=tensor.dtype)
    indices = list(itertools.product(*map(range, dims)))
    for row, out in enumerate(indices):
        for column, into in enumerate(indices):
            if all(out[k] == into[k] for k in range(len(dims)) if k not in (i, j)):
                matrix[row, column] += tensor[out[i], out[j], into[i], into[j]]
    return matrix


@pytest.mark.parametrize(
    ("dims", "order"),
    [
        ([4, 6], ["0_1"]),
        ([3, 2, 4], ["1_2", "0_2", "0_1"]),
        ([2, 3, 2, 2], ["2_3", "1_3", "0_3", "1_2", "0_2", "0_1"]),
    ],
)
@pytest.mark.parametrize(("in_features", "out_features"), [(24, 24), (19, 30), (19, 7)])
def test_quanta(dims: list[int], order: list[str], in_features: int, out_features: int) -> None:
    base = linear(in_features, out_features)
    quanta = QuanTA(in_features, out_features, dims=dims).double()
    attach(base, "quanta", quanta)
    wake_adapters(base, std=0.5)
    product = torch.eye(24, dtype=torch.float64)
    for name in order:  # the first acts first
        i, j = map(int, name.split("_"))
        product = factor(quanta.tensors[name], i, j, dims) @ product
    x = torch.randn(2, 5, in_features, dtype=torch.float64)
    padded = torch.cat([x, x.new_zeros(2, 5, 24 - in_features)], dim=-1)
    update = padded @ product.T - padded
    update = torch.cat([update, x.new_zeros(2, 5, 30)], dim=-1)[..., :out_features]
    torch.testing.assert_close(base(x), x @ base.weight.T + update, **CLOSE)
    torch.testing.assert_close(x @ quanta.delta_weight().T, update, **CLOSE)


def test_small_quanta_updates_survive_bfloat16() -> None:
    """Taken as a difference of T x and x, an update of a thousandth of x would be rounding noise."""
    quanta = QuanTA(64, 64, dims=[4, 4, 4])
    wake_adapters(quanta, std=1e-4)
    x = torch.randn(20, 64)
    exact = quanta(x)
    rounded = quanta.bfloat16()(x.bfloat16()).float()
    assert exact.norm() < 2e-3 * x.norm()
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def parameters(name: str, **adapter: Any) -> int:
    with torch.device("meta"):
        model = getattr(models, name)(adapters=[adapter])
    return sum(p.numel() for p in model.adapter_parameters().values())


def test_parameter_counts() -> None:
    assert parameters("llama_7b", type="quanta", target_modules=["q_proj", "o_proj"]) == 32 * 2 * 43_008
    # 4096 -> 11008: the tensors have the sizes of the padded input
    assert parameters("llama_7b", type="quanta", target_modules=["up_proj"]) == 32 * 43_008
    assert parameters("llama3_2_1b", type="lora", target_modules=["k_proj", "down_proj"], rank=4) == 16 * 4 * (
        (2048 + 512) + (8192 + 2048)
    )
    assert parameters("llama_7b", type="bottleneck", rank=18) == 32 * (2 * 4096 * 18 + 18 + 4096)
