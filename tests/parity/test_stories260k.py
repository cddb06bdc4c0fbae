"""A real pretrained model says what its author printed, with and without the KV cache, under every identity start."""

import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.reproduce.stories260k import TOKENIZER_FILE, greedy_sample, stories260k

NEW_TOKENS = 256  # the whole printed sample


@torch.no_grad()
def greedy(model: LlamaDecoder, bos: int, cached: bool) -> list[int]:
    """The most likely continuation of the empty story, NEW_TOKENS long."""
    tokens = [bos]
    if cached:
        model.setup_caches(1, torch.float32, decoder_max_seq_len=NEW_TOKENS)
    for position in range(NEW_TOKENS):
        if cached:
            mask = (torch.arange(NEW_TOKENS) <= position)[None, None]
            logits = model(torch.tensor([tokens[-1:]]), mask=mask, input_pos=torch.tensor([[position]]))
        else:
            logits = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[1:]


@pytest.mark.parametrize(
    ("options", "cached"),
    [({}, True), ({}, False), ({"method": "dint"}, True)],
    ids=["none", "none-full", "dint"],
)
def test_greedy_text_is_the_authors(shared_data: Path, options: dict[str, Any], cached: bool) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / TOKENIZER_FILE))
    tokens = greedy(stories260k(shared_data, **options).eval(), tokenizer.bos_id(), cached)
    want = greedy_sample(shared_data)
    text = tokenizer.decode(tokens)
    assert len(want) > 500
    assert text.strip() == want.strip()


def test_loss_on_its_home_domain(shared_data: Path) -> None:
    """Teacher-forced NLL of some TinyStories lies near the author's validation loss (1.2968)."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / TOKENIZER_FILE))
    text = (shared_data / "text" / "tiny_stories.txt").read_text(encoding="utf-8")
    model = stories260k(shared_data)
    losses = []
    for story in re.split(r"(?<!\n)\n(?!\n)", text)[:20]:
        tokens = torch.tensor([[tokenizer.bos_id(), *tokenizer.encode(story)][:400]])
        with torch.no_grad():
            logits = model(tokens)
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none"))
    assert 1.1 < torch.cat(losses).mean() < 1.5
