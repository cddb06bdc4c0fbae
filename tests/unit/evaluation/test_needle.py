"""Where the needle stands, and what counts as found."""

from pathlib import Path
from typing import cast

import pytest

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.needle import NeedleTask
from lrdint_tune.evaluation.scoring import Score, Scorer, TokenPair


class Reader:
    """Scores with the real tokenizer; a candidate is likely if the context says that it is the asked city's word."""

    def __init__(self, scorer: Scorer) -> None:
        self.real, self.max_seq_len, self.prefix = scorer, scorer.max_seq_len, scorer.prefix
        self.encode_more = scorer.encode_more
        self.contexts: list[str] = []

    def score_tokens(self, rows: list[TokenPair]) -> list[Score]:
        scores = []
        for context, candidate in rows:
            text, word = (self.real.tokenizer.tokenizer.decode(ids) for ids in (context, candidate))
            self.contexts.append(text)
            asked = text.rsplit("The secret word of ", 1)[1].removesuffix(" is")
            found = f"The secret word of {asked} is{word}." in text
            scores.append(Score(-1.0 if found else -5.0, found, len(candidate)))
        return scores


@pytest.mark.parametrize("needles", [1, 3])
def test_a_model_that_reads_finds_it(scorer: Scorer, needles: int) -> None:
    reader = Reader(scorer)
    task = NeedleTask(lengths=[300, 450], depths=[0.0, 0.5, 1.0], samples=2, needles=needles)
    measured = task.measure(cast(Scorer, reader), 0)
    assert measured.items["acc"].values == [1.0] * 12 and measured.items["exact"].values == [1.0] * 12
    assert [(c["length"], c["depth"]) for c in measured.details["cells"]] == [
        (n, d) for n in (300, 450) for d in (0.0, 0.5, 1.0)
    ]
    assert measured.details["chance"] == 0.25
    assert {text.count(" is ") for text in reader.contexts} == {needles + 1}, "each needle once, and the question"
    assert {len(scorer.encode_more(text)) for text in reader.contexts} == {300, 450}


def test_depth(scorer: Scorer) -> None:
    places = {}
    for depth in (0.0, 0.5, 1.0):
        reader = Reader(scorer)
        NeedleTask(lengths=[500], depths=[depth], samples=2).measure(cast(Scorer, reader), 3)
        text = reader.contexts[0]
        places[depth] = text.index("The secret word") / text.index("\n\nWhat")
    assert places[0.0] < 0.1 and 0.35 < places[0.5] < 0.65 and places[1.0] > 0.8


def test_a_tie_is_not_found(scorer: Scorer) -> None:
    class Blind(Reader):
        def score_tokens(self, rows: list[TokenPair]) -> list[Score]:
            return [Score(-1.0, False, 1)] * len(rows)

    measured = NeedleTask(lengths=[300], depths=[0.5], samples=3).measure(cast(Scorer, Blind(scorer)), 0)
    assert measured.items["acc"].values == [0.0] * 3


def test_the_seed_decides(scorer: Scorer) -> None:
    def contexts(seed: int) -> list[str]:
        reader = Reader(scorer)
        NeedleTask(lengths=[300], depths=[0.5], samples=2).measure(cast(Scorer, reader), seed)
        return reader.contexts

    assert contexts(0) == contexts(0) != contexts(1)


def test_haystack_of_a_file_in_its_order(scorer: Scorer, tmp_path: Path) -> None:
    file = tmp_path / "hay.txt"
    file.write_text(" ".join(f"Sentence number {n}." for n in range(200)))
    reader = Reader(scorer)
    NeedleTask(lengths=[400], depths=[0.0], samples=2, haystack=str(file)).measure(cast(Scorer, reader), 0)
    numbers = [int(part.split(".")[0]) for part in reader.contexts[0].split("Sentence number ")[1:]]
    assert len(numbers) > 5
    assert all((b - a) % 200 == 1 for a, b in zip(numbers, numbers[1:], strict=False))


@pytest.mark.parametrize(("length", "message"), [(40, "do not hold"), (510, "too near to the limit of 512")])
def test_impossible_lengths(scorer: Scorer, length: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NeedleTask(lengths=[length], depths=[0.5]).measure(scorer, 0)
