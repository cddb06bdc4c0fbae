"""Log-likelihoods against transformers' logits, and the ways in which texts are cut."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.loading import Loaded
from lrdint_tune.evaluation.scoring import Scorer
from lrdint_tune.models import llama3_2
from tests.common.tiny_run import SIZES

CPU = torch.device("cpu")
PAIRS = [
    ("The river runs", " to the sea"),
    ("A", "b"),
    ("one two three four five six", " x"),
    ("Was ", "it?"),
    ("", "Yes"),
]


def by_transformers(folder: Path, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    model = LlamaForCausalLM.from_pretrained(folder).requires_grad_(False)
    logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    target = torch.tensor(continuation)
    return float(logits.gather(1, target[:, None]).sum()), bool((logits.argmax(-1) == target).all())


def test_scores_are_those_of_transformers(model_folder: Path, scorer: Scorer) -> None:
    scores = scorer.score(PAIRS)
    for pair, score in zip(PAIRS, scores, strict=True):
        context, continuation = scorer.encode_pair(*pair)
        expected, greedy = by_transformers(model_folder, context, continuation)
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert (score.is_greedy, score.num_tokens) == (greedy, len(continuation))


def test_the_most_likely_token_is_greedy_and_another_is_not(model_folder: Path, scorer: Scorer) -> None:
    context = scorer.encode("Once upon")
    model = LlamaForCausalLM.from_pretrained(model_folder)
    best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    first, second = scorer.score_tokens([(context, [best]), (context, [(best + 1) % 250])])
    assert first.is_greedy and not second.is_greedy
    assert first.log_likelihood > second.log_likelihood


def test_batches_do_not_change_scores(loaded: Loaded, scorer: Scorer) -> None:
    alone = Scorer(loaded.model, loaded.tokenizer, device=CPU, max_tokens=1).score(PAIRS)
    for one, together in zip(alone, scorer.score(PAIRS), strict=True):
        assert one.log_likelihood == pytest.approx(together.log_likelihood, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {
            "method": "dint",
            "rank": 2,
            "integral": "sequence",
            "allow_future_leak": True,
            "lam": "fixed",
            "lam_init": 0.5,
        },
        {"method": "lmam", "rank": 2, "n": 4, "alignment": "end"},
    ],
    ids=["literal dint", "lmam at the end"],
)
def test_padding_does_not_count_where_it_would_matter(loaded: Loaded, options: dict) -> None:
    model = llama3_2(**SIZES, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    together = Scorer(model, loaded.tokenizer, device=CPU).score(PAIRS)
    alone = Scorer(model, loaded.tokenizer, device=CPU, max_tokens=1).score(PAIRS)
    for one, other in zip(alone, together, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)


def test_spaces_go_to_the_continuation_and_an_empty_context_becomes_bos(scorer: Scorer) -> None:
    assert scorer.encode_pair("a  ", "b") == scorer.encode_pair("a", "  b")
    assert scorer.encode_pair("", "b") == ([scorer.tokenizer.bos_id], scorer.encode("b"))
    with pytest.raises(ConfigError, match="has no token"):
        scorer.encode_pair("a", "")


def test_what_is_too_long_loses_its_beginning(loaded: Loaded) -> None:
    short = Scorer(loaded.model, loaded.tokenizer, device=CPU, max_seq_len=6)
    long, cut = short.score([("0123456789", "ab"), ("56789", "ab")])
    assert long == cut
    with pytest.raises(ConfigError, match=r"max_seq_len=6: a continuation has 7 tokens"):
        short.score([("a", "bcdefgh")])
    with pytest.raises(ConfigError, match="max_seq_len=1: must be from 2"):
        Scorer(loaded.model, loaded.tokenizer, device=CPU, max_seq_len=1)


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
def test_windows_predict_each_token_once(scorer: Scorer, count: int) -> None:
    ids = list(range(count))
    windows = scorer.rolling_windows(ids, 4)
    assert [token for _, predicted in windows for token in predicted] == ids
    given = [scorer.start_id, *ids]
    end = 0
    for context, predicted in windows:
        assert context == given[end + 1 - len(context) : end + 1], "a context ends just before what is predicted"
        assert len(context) + len(predicted) - 1 <= 4
        end += len(predicted)
    with pytest.raises(ConfigError, match="window=1000"):
        scorer.rolling_windows(ids, 1000)
