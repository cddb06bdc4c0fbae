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


def new_parameters(model: LlamaDecoder, *, lam: bool = False) -> int:
    """Of one layer: lambda's, or all others. The layers are alike."""
    counts = [
        sum(p.numel() for name, p in layer.attn.method.named_parameters() if name.startswith("lam.") == lam)
        for layer in model.layers
    ]
    assert set(counts) == {counts[0]}
    return counts[0]


@pytest.mark.parametrize("name", ["llama2_7b", "llama_13b"])
def test_table_of_the_differential_methods(name: str) -> None:
    """Attention parameters of a layer with as many key/value heads as query heads: 4 D^2 and what the method adds."""
    spec = build(name).spec
    d, h, n, r = spec.embed_dim, spec.num_heads, 96, 3
    added = {
        ("daa",): d * d // h,
        ("dex",): d * d // h,
        ("diffq",): d * d,
        ("diffk",): d * d,
        ("diffv",): d * d,
        ("diff", ("rank", None)): 2 * d * d,
        ("dint", ("rank", None)): 2 * d * d,
        ("dex", ("sharing", "layer")): (d // h) ** 2,
        ("dex", ("heads", "top_entropy")): d * d // h,
        ("lmam", ("n", n), ("rank", r)): 2 * h * n * r,
        ("lmam", ("n", n), ("rank", r), ("heads", h // 4)): 2 * (h // 4) * n * r,
        ("lmam", ("n", n), ("full_rank", True)): h * n * n,
    }
    for (method, *options), expected in added.items():
        model = build(name, method=method, **dict(options))
        assert new_parameters(model) == expected, (method, options)
        attention = sum(p.numel() for key, p in model.layers[0].attn.named_parameters() if ".lam." not in f".{key}")
        assert attention == 4 * d * d + expected


@pytest.mark.parametrize("name", ["smollm2_135m", "llama3_2_1b", "llama3_2_3b"])
def test_grouped_query_sizes(name: str) -> None:
    """The options that change a shape, where there are fewer key/value heads than query heads."""
    spec = build(name).spec
    d, h, k, hd, r = spec.embed_dim, spec.num_heads, spec.num_kv_heads, spec.head_dim, 4
    down, shared_up = d * r, r * hd  # of one head
    low_rank = down + shared_up
    cases: list[tuple[dict[str, Any], int]] = [
        ({"method": "daa"}, h * hd * hd),
        ({"method": "diffk"}, d * d),
        ({"method": "lmam"}, 2 * h * 128 * 2),
        ({"method": "difflora", "rank": r}, 4 * down + 2 * (h + k) * shared_up),
        ({"method": "difflora", "rank": r, "positive_lora": False}, 2 * down + (h + k) * shared_up),
    ]
    for method in ("diff", "dint"):
        cases += [
            ({"method": method, "rank": r, "noise_heads": "kv"}, 2 * k * low_rank),
            ({"method": method, "rank": r, "secondary_keys": "shared"}, h * low_rank),
            ({"method": method, "rank": None, "noise_heads": "kv", "secondary_keys": "shared"}, d * k * hd),
            ({"method": method, "rank": r, "sublayer_norm": True}, (h + k) * low_rank + hd),
        ]
    for options, expected in cases:
        assert new_parameters(build(name, **options)) == expected, options


@pytest.mark.parametrize("method", ["diff", "daa", "dex", "diffq", "diffk", "difflora", "diffv"])
def test_size_of_lambda(method: str) -> None:
    """One per query head, or per key/value head where lambda multiplies values; `exponential` one per layer."""
    spec = build("llama3_2_1b").spec
    heads = spec.num_kv_heads if method == "diffv" else spec.num_heads
    expected = {
        "learned": {None: heads, "head": heads, "layer": 1},
        "annealed": {None: heads, "head": heads, "layer": 1},
        "exponential": {None: 4 * spec.head_dim, "head": 4 * heads * spec.head_dim, "layer": 4 * spec.head_dim},
        "sigmoid": {None: heads * spec.embed_dim, "head": heads * spec.embed_dim, "layer": spec.embed_dim},
        "gated": {None: heads * spec.embed_dim, "head": heads * spec.embed_dim, "layer": spec.embed_dim},
        "fixed": {None: 0},
    }
    for lam, by_sharing in expected.items():
        for sharing, count_ in by_sharing.items():
            options = {} if sharing is None else {"lam_sharing": sharing}
            model = build("llama3_2_1b", method=method, num_layers=2, lam=lam, **options)
            assert new_parameters(model, lam=True) == count_, (lam, sharing)


def test_gpt2_sizes() -> None:
    """Seed 002 D.1: +0.59M for DAA and DEX, +7.08M for DiffQ/K/V on 12 layers of 12 heads and 768 features."""
    sizes = dict(num_layers=12, num_heads=12, num_kv_heads=12, embed_dim=768, intermediate_dim=3072)
    for method, expected in {"daa": 589_824, "dex": 589_824, "diffq": 7_077_888, "diffv": 7_077_888}.items():
        assert 12 * new_parameters(build("llama2_7b", method=method, **sizes)) == expected


def test_one_lambda_per_layer() -> None:
    model = build("llama3_2_1b", method="dint", lam_sharing="layer")
    assert [p.numel() for name, p in model.adapter_parameters().items() if name.endswith("lam.value")] == [1] * 16


@pytest.mark.parametrize("name", ["smollm2_135m", "llama3_2_1b", "llama3_2_3b"])
def test_tied_sizes(name: str) -> None:
    model = build(name)
    assert model.spec.tie_word_embeddings
    assert "output.weight" not in model.state_dict()
    assert count(build(name, tie_word_embeddings=False)) == PUBLISHED[name] + model.tok_embeddings.weight.numel()
