"""Bad options of a method: a one-line ConfigError that names the key, the value and what would be valid."""

from typing import Any

import pytest
import torch

from lrdint_tune.attention import DocumentMask
from lrdint_tune.errors import ConfigError
from tests.common.models import TINY, tiny_model

LEAKING = {"method": "dint", "integral": "sequence", "allow_future_leak": True}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "dnit"}, ["method", "dnit", "none", "diff", "dint"]),
        ({"method": "diff", "rnak": 4}, ["rnak", "rank", "factors", "secondary_scale", "lam"]),
        ({"method": "diff", "integral": "causal"}, ["integral", "diff", "rank"]),
        ({"method": "dint", "lambda": 1}, ["lambda", "rank", "integral", "allow_future_leak"]),
        ({"method": "none", "rank": 4}, ["rank", "none"]),
        ({"method": "dint", "rank": 0}, ["rank", "0", "1"]),
        ({"method": "dint", "rank": -3}, ["rank", "-3"]),
        ({"method": "dint", "rank": 2.5}, ["rank", "2.5"]),
        ({"method": "dint", "rank": "8"}, ["rank", "8"]),
        ({"method": "dint", "factors": "each"}, ["factors", "each", "per_head", "shared"]),
        ({"method": "dint", "secondary_scale": 0}, ["secondary_scale", "0", "seed", "variance", "standard"]),
        ({"method": "dint", "secondary_scale": -1.5}, ["secondary_scale", "-1.5"]),
        ({"method": "dint", "secondary_scale": float("nan")}, ["secondary_scale", "nan"]),
        ({"method": "dint", "secondary_scale": "wide"}, ["secondary_scale", "wide", "seed", "variance", "standard"]),
        ({"method": "dint", "integral": "full"}, ["integral", "full", "causal", "sequence"]),
        ({"method": "dint", "integral": "sequence"}, ["integral", "sequence", "allow_future_leak"]),
        (
            {"method": "dint", "attention_backend": "fast"},
            ["attention_backend", "fast", "eager", "sdpa", "flex", "auto"],
        ),
        ({"num_heads": 4, "num_kv_heads": 3}, ["num_heads", "4", "num_kv_heads", "3"]),
    ],
)
def test_bad_options(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_model(**options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_leaking_model_refuses_the_cache() -> None:
    model = tiny_model(**LEAKING)
    with pytest.raises(ConfigError, match="integral.*sequence.*causal"):
        model.setup_caches(1, torch.float32)
    with pytest.raises(ConfigError, match="integral"):
        model.layers[0].attn.setup_cache(1, torch.float32, 16)


def test_resetting_a_cache_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="cache"):
        tiny_model(method="dint").layers[0].attn.reset_cache()


@pytest.mark.parametrize("lengths", [[[3, 4], [7, 1]], [[3, 0, 4]], [[5, -1, 3]], []])
def test_document_lengths_that_do_not_fit(lengths: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="length"):
        DocumentMask(lengths)


@pytest.mark.parametrize(
    "mask",
    [
        DocumentMask([[3, 4]]),
        torch.ones(1, 7, 7, dtype=torch.bool),
        torch.ones(1, 8, 7, dtype=torch.bool),
        torch.zeros(1, 8, 8),
        torch.ones(8, 8, dtype=torch.bool),
        DocumentMask([[3, 5], [4, 4], [8]]),
        DocumentMask([[3, 5]]),
        torch.ones(3, 8, 8, dtype=torch.bool),
    ],
    ids=[
        "documents_too_short",
        "too_small",
        "too_few_keys",
        "additive",
        "two_dims",
        "documents_of_three_rows",
        "documents_of_one_row",
        "dense_of_three_rows",
    ],
)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_mask_that_does_not_fit(backend: str, mask: Any) -> None:
    """Two rows of eight tokens. A mask of one row must not be taken for the mask of both."""
    model = tiny_model(method="dint", attention_backend=backend)
    with pytest.raises(ValueError, match="mask|Mask|documents"):
        model(torch.randint(TINY["vocab_size"], (2, 8)), mask=mask)


def test_a_cache_that_is_too_small() -> None:
    model = tiny_model(method="dint")
    model.setup_caches(1, torch.float32, decoder_max_seq_len=4)
    mask = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="cache"):
        model(torch.randint(TINY["vocab_size"], (1, 5)), mask=mask, input_pos=torch.arange(5)[None])
