"""The cache over its life: reset, disabled, smaller batches, bf16, torchtune's padding masks.

That decoding equals one full forward, for every method: test_methods_rows.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchtune.modules.common_utils import disable_kv_cache

from lrdint_tune.models.decoder import LlamaDecoder
from tests.common.models import TINY, tiny_model, wake

METHODS: dict[str, dict[str, Any]] = {
    "dint": {"method": "dint", "rank": 3},
    "diffv": {"method": "diffv", "anneal_steps": 10},
    "lmam": {"method": "lmam", "n": 7, "scale": 0.5},
}
"""One with a second stream and a running sum, one whose values are changed, one that counts positions."""
LENGTH = 16
CACHE = 20
PIECES = [5, 1, 1, 1, 1, 3, 1, 3]
"""A prefill of several tokens, then one by one, then chunks."""


def build(method: str, backend: str, **sizes: Any) -> LlamaDecoder:
    model = wake(tiny_model(attention_backend=backend, **METHODS[method], **sizes)).eval()
    model.advance_schedule(4)
    return model


@torch.no_grad()
def decode(model: LlamaDecoder, tokens: Tensor, allowed: Tensor, positions: Tensor, pieces: list[int]) -> Tensor:
    """Logits of `tokens` piece by piece. allowed [B, N, N], padded to the cache's length; positions [B, N]."""
    allowed = torch.nn.functional.pad(allowed, (0, CACHE - allowed.shape[-1]))
    out, start = [], 0
    for length in pieces:
        piece = slice(start, start + length)
        out.append(model(tokens[:, piece], mask=allowed[:, piece], input_pos=positions[:, piece]))
        start += length
    assert start == tokens.shape[1]
    return torch.cat(out, dim=1)


def causal(batch: int) -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(batch, LENGTH, LENGTH)


@pytest.mark.parametrize("method", METHODS)
def test_a_reset_forgets_everything(method: str) -> None:
    model = build(method, "sdpa")
    tokens = torch.randint(TINY["vocab_size"], (2, LENGTH))
    with torch.no_grad():
        want = model(tokens)
    model.setup_caches(2, torch.float32, decoder_max_seq_len=CACHE)
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    other = torch.randint(TINY["vocab_size"], (2, LENGTH))
    for pieces in (PIECES, [LENGTH], [1] * LENGTH):
        decode(model, other, causal(2), positions, PIECES)
        model.reset_caches()
        got = decode(model, tokens, causal(2), positions, pieces)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=5e-6)
        model.reset_caches()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("method", METHODS)
def test_left_padded_batch(method: str, backend: str) -> None:
    """Rows of different lengths decode as each does alone, under torchtune's mask: padded rows see themselves."""
    model = build(method, backend)
    padding = [3, 0, 6]
    tokens = torch.randint(TINY["vocab_size"], (3, LENGTH))
    with torch.no_grad():
        alone = [model(tokens[b : b + 1, p:])[0] for b, p in enumerate(padding)]
    real = torch.arange(LENGTH) >= torch.tensor(padding)[:, None]
    allowed = (causal(3) & real[:, None, :]) | torch.eye(LENGTH, dtype=torch.bool)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    model.setup_caches(3, torch.float32, decoder_max_seq_len=CACHE)
    # The prefill ends inside the longest padding: a chunk may hold the end of one row's padding.
    for pieces in ([8, 1, 1, 3, 3], [4, 4, 1, 7], [1] * LENGTH):
        got = decode(model, tokens, allowed, positions, pieces)
        assert torch.isfinite(got).all()
        for b, p in enumerate(padding):
            torch.testing.assert_close(got[b, p:], alone[b], rtol=1e-4, atol=5e-6)
        model.reset_caches()


def test_bf16_caches_keep_the_running_mean_in_fp32() -> None:
    model = build("dint", "sdpa").to(torch.bfloat16)
    tokens = torch.randint(TINY["vocab_size"], (1, LENGTH))
    with torch.no_grad():
        want = model(tokens)
    model.setup_caches(1, torch.bfloat16, decoder_max_seq_len=CACHE)
    dtypes = {name.rsplit(".", 1)[1]: buffer.dtype for name, buffer in model.named_buffers() if "kv_cache" in name}
    assert {dtypes["k_cache"], dtypes["v_cache"], dtypes["k2_cache"]} == {torch.bfloat16}
    assert dtypes["running_total"] == torch.float32
    got = decode(model, tokens, causal(1), torch.arange(LENGTH)[None], PIECES)
    torch.testing.assert_close(got, want, rtol=0, atol=0.05 * want.abs().max().item())


def test_a_batch_smaller_than_the_cache() -> None:
    model = build("dint", "sdpa")
    tokens = torch.randint(TINY["vocab_size"], (2, LENGTH))
    with torch.no_grad():
        want = model(tokens)
    model.setup_caches(3, torch.float32, decoder_max_seq_len=CACHE)
    got = decode(model, tokens, causal(2), torch.arange(LENGTH).expand(2, LENGTH), PIECES)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=5e-6)


def test_the_caches_are_not_saved() -> None:
    model = build("dint", "sdpa")
    names = set(model.state_dict())
    model.setup_caches(1, torch.float32, decoder_max_seq_len=CACHE)
    assert set(model.state_dict()) == names


def test_caches_can_be_disabled() -> None:
    """With `cache_enabled` off a full forward ignores and leaves the caches alone, as in torchtune."""
    model = build("dint", "sdpa")
    tokens = torch.randint(TINY["vocab_size"], (1, LENGTH))
    other = torch.randint(TINY["vocab_size"], (1, LENGTH))
    positions = torch.arange(LENGTH)[None]
    with torch.no_grad():
        want, want_other = model(tokens), model(other)
        model.setup_caches(1, torch.float32, decoder_max_seq_len=CACHE)
        first = decode(model, tokens[:, :7], causal(1)[:, :7, :7], positions[:, :7], [7])
        with disable_kv_cache(model):
            torch.testing.assert_close(model(other), want_other, rtol=1e-4, atol=5e-6)
        allowed = torch.nn.functional.pad(causal(1), (0, CACHE - LENGTH))
        rest = model(tokens[:, 7:], mask=allowed[:, 7:], input_pos=positions[:, 7:])
    torch.testing.assert_close(torch.cat([first, rest], dim=1), want, rtol=1e-4, atol=5e-6)
