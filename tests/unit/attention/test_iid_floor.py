"""Tokens drawn independently cannot be predicted: a loss below their entropy proves that the future is visible."""

import math
from typing import Any

import pytest
import torch

from lrdint_tune.models import llama3_2

VOCAB, LENGTH, BATCH = 8, 6, 64
FLOOR = math.log(VOCAB)


def trained_loss(steps: int, **options: Any) -> float:
    """Mean loss in nats over the last 50 of `steps` steps, every batch fresh."""
    model = llama3_2(
        vocab_size=VOCAB,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=LENGTH,
        intermediate_dim=64,
        rope_base=100,
        scale_factor=1,
        tie_word_embeddings=False,
        attention_backend="sdpa",
        method="dint",
        rank=4,
        **options,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(VOCAB, (BATCH, LENGTH))
        labels = torch.cat([tokens[:, 1:], torch.full((BATCH, 1), -100)], dim=1)
        loss = model(tokens, labels=labels) / (BATCH * (LENGTH - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


@pytest.mark.slow
def test_the_causal_integral_stays_at_the_floor() -> None:
    assert trained_loss(600) > FLOOR - 0.01


@pytest.mark.slow
def test_the_literal_integral_falls_below_it() -> None:
    assert trained_loss(600, integral="sequence", allow_future_leak=True) < FLOOR - 0.5
