"""Every size has its published number of parameters, and the methods add what their formulas say."""

from typing import Any

import pytest
import torch

from lrdint_tune import models
from lrdint_tune.models import LlamaDecoder

PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama_7b": 6_738_415_616,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama_13b": 13_015_864_320,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_70b": 70_553_706_496,
    "llama3_1_70b": 70_553_706_496,
    "llama3_3_70b": 70_553_706_496,
}


def build(name: str, **options: Any) -> LlamaDecoder:
    with torch.device("meta"):
        return getattr(models, name)(**options)


def count(model: LlamaDecoder) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name: str) -> None:
    model = build(name)
    assert count(model) == PUBLISHED[name]
    assert not model.adapter_parameters()


@pytest.mark.parametrize("name", ["smollm2_135m", "llama3_2_1b", "llama3_2_3b", "llama3_1_8b", "llama3_3_70b"])
@pytest.mark.parametrize("method", ["diff", "dint"])
@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 5, "factors": "shared"}, {"rank": None}], ids=str)
def test_new_parameters(name: str, method: str, options: dict[str, Any]) -> None:
    model = build(name, method=method, **options)
    spec, r = model.spec, options["rank"]
    d, h, k, hd = spec.embed_dim, spec.num_heads, spec.num_kv_heads, spec.head_dim
    if r is None:
        a_layer = d * hd * (h + k)
    elif options.get("factors") == "shared":
        a_layer = 2 * d * r + r * hd * (h + k)
    else:
        a_layer = d * r * (h + k) + r * hd * (h + k)
    expected = spec.num_layers * (a_layer + h)  # λ: one per head
    assert sum(p.numel() for p in model.adapter_parameters().values()) == expected
    assert count(model) == PUBLISHED[name] + expected


def test_one_lambda_per_layer() -> None:
    model = build("llama3_2_1b", method="dint", lam_sharing="layer")
    assert [p.numel() for name, p in model.adapter_parameters().items() if name.endswith("lam.value")] == [1] * 16


@pytest.mark.parametrize("name", ["smollm2_135m", "llama3_2_1b", "llama3_2_3b"])
def test_tied_sizes(name: str) -> None:
    model = build(name)
    assert model.spec.tie_word_embeddings
    assert "output.weight" not in model.state_dict()
    assert count(build(name, tie_word_embeddings=False)) == PUBLISHED[name] + model.tok_embeddings.weight.numel()
