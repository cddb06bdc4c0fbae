"""Causality, caches, packing and padding of the methods in their hosts, with λ away from 0."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.hosts import attach, methods
from tests.common.hosts import CASES, CAUSAL, PAD, SUPPORTED, inputs, right_padded, tiny, tokens, wake

TOLERANCE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def awake(host: str, method: str, **options: Any) -> Any:
    model = attach(tiny(host), method, **{**SUPPORTED[host][method], **options})
    wake(model)
    return model


@pytest.mark.parametrize(("host", "method"), CAUSAL)
def test_causality(host: str, method: str) -> None:
    model, ids = awake(host, method), tokens()
    other = ids.clone()
    other[:, 6:] = tokens(length=20)[:, 15:]
    before, after = model(ids).logits, model(other).logits
    torch.testing.assert_close(after[:, :6], before[:, :6], **TOLERANCE)
    assert not torch.allclose(after[:, 6:], before[:, 6:])


@pytest.mark.parametrize("method", SUPPORTED["bart"])
def test_causality_of_barts_decoder(method: str) -> None:
    model, ids = awake("bart", method), tokens()
    other = ids.clone()
    other[:, 6:] = tokens(length=20)[:, 15:]
    before, after = (model(input_ids=ids, decoder_input_ids=d).logits for d in (ids, other))
    torch.testing.assert_close(after[:, :6], before[:, :6], **TOLERANCE)


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6], [9, 2]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("host", "method"), CAUSAL)
def test_cached_decoding(host: str, method: str, padded: bool, pieces: list[int]) -> None:
    """In any pieces, the cache gives the logits of one full forward; left padding as ``generate`` makes it."""
    model, ids = awake(host, method), tokens()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, got, end = None, [], 0
    for piece in pieces:
        begin, end = end, end + piece
        out = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        got.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(got, 1)[real], expected[real], **TOLERANCE)


@pytest.mark.parametrize(
    ("host", "method", "options"),
    [
        ("gpt2", "daa", {"lam": "sigmoid"}),
        ("gpt2", "diffv", {"lam": "sigmoid"}),
        ("llama", "diffv", {"lam": "sigmoid", "lam_sharing": "layer"}),
        ("llama", "dex", {"lam": "exponential"}),
        ("llama", "lmam", {"inside_softmax": True}),
        ("gpt2", "lmam", {"softmax_map": True}),
    ],
)
def test_cached_decoding_of_other_forms(host: str, method: str, options: dict[str, Any]) -> None:
    model, ids = awake(host, method, **options), tokens()
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    got = torch.cat([first.logits, second.logits], 1)
    # λ is float32.
    torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("host", "method"), [case for case in CASES if case[0] != "roberta"])
def test_generate_with_and_without_cache(host: str, method: str) -> None:
    model, ids = awake(host, method), tokens()
    ids[0, :3] = PAD
    given: dict[str, Any] = {"attention_mask": (ids != PAD).long(), "max_new_tokens": 8, "do_sample": False}
    cached = model.generate(ids, use_cache=True, **given)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **given))


def test_alignment_end_refuses_the_cache() -> None:
    model = awake("gpt2", "lmam", alignment="end")
    model.generate(tokens(), max_new_tokens=3, use_cache=False)
    with pytest.raises(ConfigError, match="alignment='end'.*use alignment=start"):
        model.generate(tokens(), max_new_tokens=3, use_cache=True)


@pytest.mark.parametrize("alignment", ["start", "end"])
@pytest.mark.parametrize(("host", "method"), [("gpt2", "daa"), ("gpt2", "lmam"), ("gpt2", "diffv"), ("llama", "lmam")])
def test_packed_documents(host: str, method: str, alignment: str) -> None:
    """Positions that restart begin a document: as the documents one by one."""
    options = {"alignment": alignment} if method == "lmam" else {}
    model, ids = awake(host, method, **options), tokens(rows=1, length=12)
    lengths = [4, 7, 1]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, **TOLERANCE)


@pytest.mark.parametrize("alignment", ["start", "end"])
@pytest.mark.parametrize(("host", "method"), CASES)
def test_padding_counts_for_nothing(host: str, method: str, alignment: str) -> None:
    options = {"alignment": alignment} if method == "lmam" else {}
    model, length = awake(host, method, **options), 7
    ids, mask = right_padded(tokens(), length)
    padded = model(**inputs(host, ids, mask)).logits[0]
    short: dict[str, Tensor] = {"input_ids": ids[:1, :length]}
    if host == "bart":
        short["decoder_input_ids"] = ids.flip(1)[:1]
    alone = model(**short).logits[0]
    torch.testing.assert_close(padded[: len(alone)], alone, **TOLERANCE)


def test_encoder_sees_the_future_through_lmam() -> None:
    """No ``tril`` there: the first row's added part depends on later tokens."""
    model = attach(tiny("roberta", num_hidden_layers=1), "lmam", n=6, full_rank=True, scale=1.0)
    method = model.roberta.encoder.layer[0].attention.self.method
    with torch.no_grad():
        method.w[:, 0, 3] = 2.0  # above the diagonal
    plain = tiny("roberta", num_hidden_layers=1)
    assert not torch.allclose(model(tokens()).logits, plain(tokens()).logits, atol=1e-3)


def test_barts_default_for_lmam_is_the_encoder() -> None:
    model = attach(tiny("bart"), "lmam", n=6)
    carriers = {name.split(".method.")[0] for name in model.state_dict() if ".method." in name}
    assert carriers == {f"model.encoder.layers.{i}.self_attn" for i in range(2)}
    everywhere = attach(tiny("bart"), "daa")
    carriers = {name.split(".method.")[0] for name in everywhere.state_dict() if ".method." in name}
    assert carriers == {f"model.{s}.layers.{i}.self_attn" for s in ("encoder", "decoder") for i in range(2)}


@pytest.mark.parametrize("host", ["gpt2", "roberta", "llama"])
def test_entropy_counts_no_padding(host: str) -> None:
    model = attach(tiny(host), "dex", heads="top_entropy")
    ids, mask = right_padded(tokens(), 7)
    entropies = []
    for given in ({"input_ids": ids[:1], "attention_mask": mask[:1]}, {"input_ids": ids[:1, :7]}):
        sums = [method.start_calibration() for method in methods(model)]
        model(**given)
        entropies.append(torch.stack(sums))
    torch.testing.assert_close(*entropies, rtol=1e-5, atol=1e-6)
    assert entropies[0].min() > 0
