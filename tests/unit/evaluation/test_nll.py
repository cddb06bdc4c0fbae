"""Held-out losses document by document, and the difference that a look ahead makes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.nll import PER_DOCUMENT, document_nll, draw_positions, measure_leak, plan_batches
from lrdint_tune.models import LlamaDecoder
from tests.common.models import tiny_model, wake

CPU = torch.device("cpu")
LENGTHS = (9, 23, 23, 4, 17)
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "dint": {"method": "dint"},
    "literal": {"method": "dint", "integral": "sequence", "allow_future_leak": True},
    "lmam": {"method": "lmam", "n": 16},
}


@pytest.fixture
def rows() -> list[tuple[Tensor, Tensor]]:
    """Documents with some untrained tokens at their start, as prompts have them."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for i, n in enumerate(LENGTHS):
        tokens = torch.randint(0, 60, (n,), generator=generator)
        labels = F.pad(tokens[1:], (0, 1), value=-100)
        labels[: i % 3] = -100
        made.append((tokens, labels))
    return made


def build(variant: str) -> LlamaDecoder:
    torch.manual_seed(0)
    return wake(tiny_model(**VARIANTS[variant])).double()


def nll(model: LlamaDecoder, tokens: Tensor, position: int, label: int) -> float:
    with torch.no_grad():
        return float(-model(tokens[None])[0, position].log_softmax(-1)[label])


@pytest.mark.parametrize("max_tokens", [1, 50, 4096])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_document_by_itself(variant: str, max_tokens: int, rows: list[tuple[Tensor, Tensor]]) -> None:
    model = build(variant).train()
    found = document_nll(model, rows, device=CPU, max_tokens=max_tokens)
    for i, (tokens, labels) in enumerate(rows):
        places = (labels != -100).nonzero().squeeze(1).tolist()
        expected = sum(nll(model, tokens, p, int(labels[p])) for p in places)
        assert found.sums[i] == pytest.approx(expected, abs=1e-9)
        assert found.counts[i] == len(places)
    assert found.estimate().mean == pytest.approx(found.sums.sum() / found.counts.sum())
    assert model.training


@pytest.mark.parametrize("max_tokens", [30, 4096])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefix_wise(variant: str, max_tokens: int, rows: list[tuple[Tensor, Tensor]]) -> None:
    """Against one forward per position; only the form that looks ahead has a difference."""
    model = build(variant)
    found = measure_leak(model, rows, positions=20, device=CPU, max_tokens=max_tokens)
    chosen = draw_positions(rows, 20, 0)
    whole = [nll(model, rows[r][0], p, int(rows[r][1][p])) for r, p in chosen]
    alone = [nll(model, rows[r][0][: p + 1], p, int(rows[r][1][p])) for r, p in chosen]
    assert found.positions == len(chosen) == 20
    assert found.teacher_forced.mean == pytest.approx(sum(whole) / 20, abs=1e-9)
    assert found.prefix_wise.mean == pytest.approx(sum(alone) / 20, abs=1e-9)
    for sums, losses in ((found.inside_sums, whole), (found.alone_sums, alone)):
        per_row = [sum(loss for loss, (r, _) in zip(losses, chosen, strict=True) if r == row) for row in range(5)]
        assert sums == pytest.approx([s for s in per_row if s], abs=1e-9)
    assert found.counts.tolist() == [count for row in range(5) if (count := sum(r == row for r, _ in chosen))]
    assert found.gap.mean == pytest.approx(found.prefix_wise.mean - found.teacher_forced.mean)
    assert (abs(found.gap.mean) > 1e-3) == (variant == "literal")


def test_positions_are_drawn_once_and_spread(rows: list[tuple[Tensor, Tensor]]) -> None:
    every = draw_positions(rows, 1000, 0)
    assert len(set(every)) == len(every)
    assert all(rows[r][1][p] != -100 for r, p in every)
    assert max(sum(r == row for r, _ in every) for row in range(len(rows))) == PER_DOCUMENT
    for count in (3, 5, 12):
        drawn = draw_positions(rows, count, 0)
        each = [sum(r == row for r, _ in drawn) for row in range(len(rows))]
        assert len(drawn) == count and max(each) - min(each) <= 1
    assert draw_positions(rows, 10, 1) == draw_positions(rows, 10, 1) != draw_positions(rows, 10, 2)


def test_batches_hold_every_row_once_within_the_limit() -> None:
    batches = plan_batches(LENGTHS, 50)
    assert sorted(sum(batches, [])) == list(range(len(LENGTHS)))
    assert all(len(batch) * max(LENGTHS[i] for i in batch) <= 50 for batch in batches)


def test_nothing_to_evaluate(rows: list[tuple[Tensor, Tensor]]) -> None:
    model = build("none")
    with pytest.raises(ConfigError, match="no documents"):
        document_nll(model, [], device=CPU)
    with pytest.raises(ConfigError, match="no trained token"):
        measure_leak(model, [(rows[0][0], torch.full_like(rows[0][1], -100))], positions=4, device=CPU)


def test_per_token_losses_are_those_of_the_logits() -> None:
    model = build("dint")
    tokens = torch.randint(0, 60, (2, 12))
    labels = tokens.roll(-1, 1)
    labels[:, :3] = -100
    losses, most_likely = model(tokens, labels=labels, per_token=True)
    logits = model(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    assert torch.allclose(losses, expected) and not losses.requires_grad
    assert most_likely.equal(logits.argmax(-1) == labels)
    assert torch.allclose(losses.sum(), model(tokens, labels=labels))
