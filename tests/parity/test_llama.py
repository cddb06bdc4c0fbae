"""The plain builder computes the logits of transformers' LlamaForCausalLM from the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lrdint_tune.models import llama3_2
from tests.common.hf import tiny_llama, to_torchtune

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "head_dim": 8,
    "max_seq_len": 640,
    "intermediate_dim": 40,
    "rope_base": 10_000,
    "norm_eps": 1e-5,
    "scale_factor": 1,
    "tie_word_embeddings": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "mha": {"num_kv_heads": 4},
    "mqa": {"num_kv_heads": 1},
    "wide_heads": {"head_dim": 16},
    "other_eps": {"norm_eps": 1e-2},
    "llama3_rope": {"scale_factor": 32, "rope_base": 500_000, "head_dim": 64},
}


def logits(sizes: dict[str, Any], backend: str, length: int, **override: Any) -> tuple[Tensor, Tensor]:
    """(ours, theirs), [2, length, vocab]; `override` changes our builder only."""
    theirs = tiny_llama(sizes)
    ours = llama3_2(**{**sizes, "attention_backend": backend, **override})
    ours.load_state_dict(to_torchtune(theirs))
    tokens = torch.randint(sizes["vocab_size"], (2, length))
    with torch.no_grad():
        return ours(tokens), theirs(tokens).logits


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal(variant: str, backend: str) -> None:
    # Scaled frequencies differ visibly only over hundreds of positions.
    ours, theirs = logits({**SIZES, **VARIANTS[variant]}, backend, 600 if variant == "llama3_rope" else 40)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("variant", ["tied", "untied"])
def test_summed_loss_and_gradients_equal(variant: str) -> None:
    """The loss that never holds the logits, against theirs; ignored positions count for nothing."""
    sizes = {**SIZES, **VARIANTS[variant]}
    theirs = tiny_llama(sizes)
    ours = llama3_2(**sizes)
    ours.load_state_dict(to_torchtune(theirs))
    tokens = torch.randint(sizes["vocab_size"], (2, 40))
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    labels[0, :13] = -100
    loss = ours(tokens, labels=labels)
    assert loss.dtype == torch.float32 and loss.shape == ()
    want = cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    loss.backward()
    want.backward()
    want_gradients = to_torchtune(theirs, gradients=True)
    assert set(want_gradients) == set(dict(ours.named_parameters()))
    for name, parameter in ours.named_parameters():
        scale = want_gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, want_gradients[name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("variant", "override"),
    [("llama3_rope", {"scale_factor": 1}), ("tied", {"rope_base": 20_000}), ("other_eps", {"norm_eps": 1e-5})],
)
def test_a_wrong_setting_shows(variant: str, override: dict[str, Any]) -> None:
    """The comparison above is sensitive to what it is meant to check."""
    ours, theirs = logits({**SIZES, **VARIANTS[variant]}, "sdpa", 600 if variant == "llama3_rope" else 40, **override)
    assert (ours - theirs).abs().max() > 1e-2
