"""The formula against torch's own counter, where the running mean, which the formula leaves out, is small."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lrdint_tune.attention import Layout, integral
from lrdint_tune.models import LlamaDecoder, llama3_2
from lrdint_tune.training.flops import training_flops_per_token
from tests.common.cases import CASES, MethodCase

SIZES: dict[str, Any] = dict(
    vocab_size=300,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=192,
    max_seq_len=128,
    intermediate_dim=4096,
    scale_factor=1,
    attention_backend="eager",  # the counter sees nothing in torch's kernels on a CPU
)
B, N = 2, 96


def counted(model: LlamaDecoder) -> float:
    tokens = torch.randint(0, 300, (B, N))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).backward()
    return counter.get_total_flops() / (B * N)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "none"},
        {"method": "none", "tie_word_embeddings": False},
        {"method": "dint", "rank": 8},
        {"method": "dint", "rank": 8, "factors": "shared"},
        {"method": "diff", "rank": None, "secondary_scale": "standard"},
        {"method": "dint", "head_dim": 64},
        {"adapters": [{"type": "lora", "target_modules": ["q_proj", "down_proj"], "rank": 64}]},
        {"adapters": [{"type": "quanta", "target_modules": ["o_proj", "down_proj"]}, {"type": "bottleneck"}]},
    ],
    ids=str,
)
def test_all_trained(options: dict[str, Any]) -> None:
    model = llama3_2(**{**SIZES, **options})
    assert training_flops_per_token(model, N) == pytest.approx(counted(model), rel=0.01)


@pytest.mark.parametrize("case", [case for case in CASES if case.options["method"] != "none"], ids=str)
def test_every_method(case: MethodCase) -> None:
    """With an MLP so narrow that the method's own part shows."""
    model = llama3_2(**{**SIZES, "intermediate_dim": 64, "vocab_size": 64, "embed_dim": 384, **case.options})
    tokens = torch.randint(0, 64, (1, N))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).backward()
    causal_dint = case.options["method"] == "dint" and case.options.get("integral") != "sequence"
    integral = _integral_flops(model) if causal_dint else 0.0
    assert training_flops_per_token(model, N) == pytest.approx(counter.get_total_flops() / N - integral, rel=0.01)


def _integral_flops(model: LlamaDecoder) -> float:
    """Of the running mean as matrix products, per token."""
    o = torch.randn(1, model.spec.num_heads, N, model.spec.head_dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        integral(o, o.detach(), torch.ones(1), Layout(None, None, num_queries=N)).sum().backward()
    return model.spec.num_layers * counter.get_total_flops() / N


def test_frozen_weights_cost_less() -> None:
    """A frozen weight has no gradient of its own. Only what comes before the first trained tensor is counted although
    nothing flows back there: less than a layer."""
    model = llama3_2(**{**SIZES, "num_layers": 6, "method": "dint"})
    whole = training_flops_per_token(model, N)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".attn." in name)
    frozen = training_flops_per_token(model, N)
    assert frozen < whole
    assert frozen == pytest.approx(counted(model), rel=0.03)


@pytest.mark.parametrize(("method", "maps"), [("none", 1), ("dint", 2)])
def test_causal_half(method: str, maps: int) -> None:
    """Three passes of two products, 2 hd each, for every pair of a row and a key that is not after it."""
    model = llama3_2(**{**SIZES, "method": method})
    spec = model.spec
    later = int(torch.ones(N, N).triu(1).sum())
    left_out = later * 3 * 2 * 2 * spec.head_dim * spec.num_heads * spec.num_layers * maps
    full, causal = (training_flops_per_token(model, N, causal=causal) for causal in (False, True))
    assert full - causal == pytest.approx(left_out / N)


def test_meta_parameters_are_enough() -> None:
    with torch.device("meta"):
        model = llama3_2(**SIZES)
    assert training_flops_per_token(model, N) == training_flops_per_token(llama3_2(**SIZES), N)
