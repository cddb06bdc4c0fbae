"""Needle retrieval: one fact in a long text, asked for at its end.

Seed 002 reports a needle-retrieval score and does not describe its version; this one is ours. A needle says "The secret
word of Paris is lantern." It stands at a given depth of a haystack of neutral sentences, with other needles about other
cities, if asked for. The context ends with "The secret word of Paris is". The model chooses among candidate words
by likelihood, and, separately, has the right one as its greedy continuation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.measured import Measured, Values
from lrdint_tune.evaluation.scoring import Scorer, TokenPair

CITIES = ("Paris", "London", "Berlin", "Rome", "Madrid", "Vienna", "Moscow", "Tokyo", "Cairo", "Lima", "Oslo", "Delhi")
WORDS = (
    "lantern apple hammer guitar dragon pepper anchor violin tiger candle bottle rocket diamond basket helmet pencil"
).split()
NEEDLE = "The secret word of {city} is {word}."
QUESTION = "\n\nWhat is the secret word of {city}? The secret word of {city} is"

_WHO = "gardener teacher doctor farmer painter student traveller neighbour baker clerk".split()
_DID = ("walked along", "looked at", "talked about", "waited near", "thought of", "wrote about", "returned to")
_WHAT = "river garden market bridge station museum library harbour forest village".split()
_HOW = ("quiet", "old", "busy", "small", "famous", "distant", "pleasant", "narrow")
_WHEN = "in the morning|after lunch|before the rain|late in the evening|during the summer|on a cold day".split("|")


@dataclass(frozen=True)
class NeedleTask:
    """A grid of lengths and depths.

    Attributes:
        task: ``needle``.
        name: under which the results stand; None: ``needle``.
        lengths: of the whole context in tokens, question included.
        depths: where the needle stands, from 0 (the beginning) to 1 (just before the question).
        samples: per length and depth.
        needles: facts in the haystack; the others are about other cities, at random depths.
        candidates: words that the model chooses from; those of the other needles come first.
        haystack: a text file to take sentences from; None: built-in neutral ones.
    """

    task: str = "needle"
    name: str | None = None
    lengths: list[int] | None = None
    depths: list[float] | None = None
    samples: int = 10
    needles: int = 1
    candidates: int = 4
    haystack: str | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) and n > 0 for n in self.grid[0]):
            raise ConfigError(f"lengths={self.lengths}: must be positive whole numbers of tokens")
        if not all(isinstance(d, (int, float)) and 0 <= d <= 1 for d in self.grid[1]):
            raise ConfigError(f"depths={self.depths}: must be from 0 to 1")
        if self.samples < 2:
            raise ConfigError(f"samples={self.samples}: must be at least 2, for a standard error")
        if not 1 <= self.needles <= len(CITIES):
            raise ConfigError(f"needles={self.needles}: must be from 1 to {len(CITIES)}")
        if not max(2, self.needles) <= self.candidates <= len(WORDS):
            raise ConfigError(
                f"candidates={self.candidates}: must be from {max(2, self.needles)} (needles={self.needles}) to "
                f"{len(WORDS)}"
            )
        if self.haystack is not None and not Path(self.haystack).is_file():
            raise ConfigError(f"haystack={self.haystack!r}: no such file; give a text file")

    @property
    def grid(self) -> tuple[list[int], list[float]]:
        return self.lengths or [256, 512, 1024], self.depths or [0.0, 0.25, 0.5, 0.75, 1.0]

    def places(self) -> dict[str, Any]:
        return {"haystack": self.haystack}

    def versions(self) -> dict[str, str]:
        return {}

    def measure(self, scorer: Scorer, seed: int) -> Measured:
        """``acc``: the right word is the likeliest candidate (a tie counts as wrong); ``exact``: it is the greedy
        continuation; ``nll`` of the right word, in nats. Over the whole grid, and by length and depth in ``cells``.

        Raises:
            ConfigError: a length beyond the model's limit, or too short for the needles and the question.
        """
        text = None if self.haystack is None else _sentences_of(self.haystack)
        lengths, depths = self.grid
        cells, rows = [], []
        for length in lengths:
            for depth in depths:
                cells.append((length, depth))
                for sample in range(self.samples):
                    # The same draws whatever else is on the grid.
                    draw = random.Random(f"{seed} {length} {depth} {sample}")
                    rows += self._candidates(scorer, text, length, depth, draw)
        scores = scorer.score_tokens(rows)
        acc, exact, nll = [], [], []
        for begin in range(0, len(scores), self.candidates):
            right, *others = scores[begin : begin + self.candidates]
            acc.append(float(all(right.log_likelihood > other.log_likelihood for other in others)))
            exact.append(float(right.is_greedy))
            nll.append(-right.log_likelihood)
        details = []
        for number, (length, depth) in enumerate(cells):
            part = slice(number * self.samples, (number + 1) * self.samples)
            metrics = {"acc": acc[part], "exact": exact[part], "nll": nll[part]}
            estimates = {name: Values(values).estimate().as_dict() for name, values in metrics.items()}
            details.append({"length": length, "depth": depth, **estimates})
        return Measured(
            {"acc": Values(acc), "exact": Values(exact), "nll": Values(nll)},
            details={"cells": details, "chance": 1 / self.candidates},
        )

    def _candidates(
        self, scorer: Scorer, text: list[str] | None, length: int, depth: float, draw: random.Random
    ) -> list[TokenPair]:
        """One context with each candidate after it, the right one first."""
        cities, words = draw.sample(CITIES, self.needles), draw.sample(WORDS, self.candidates)
        facts = list(zip(cities, words, strict=False))
        question = scorer.encode_more(QUESTION.format(city=cities[0]))
        needles = [scorer.encode_more(" " + NEEDLE.format(city=city, word=word)) for city, word in facts]
        room = length - len(scorer.prefix) - len(question) - sum(map(len, needles))
        if room < 1:
            raise ConfigError(f"lengths: {length} tokens do not hold {self.needles} needles and the question; raise it")
        if length + 8 > scorer.max_seq_len:
            raise ConfigError(f"lengths: {length} is too near to the limit of {scorer.max_seq_len} tokens; lower it")
        hay = _hay(scorer, _generated(draw) if text is None else _cycle(text, draw), room)
        # The asked one last, so that its place is exact.
        for needle, at in zip(needles[::-1], [*(draw.random() for _ in needles[1:]), depth], strict=True):
            hay.insert(_boundary(hay, at), needle)
        context = [*scorer.prefix, *(token for sentence in hay for token in sentence), *question]
        return [(context, scorer.encode_more(f" {word}")) for word in words]


def _hay(scorer: Scorer, sentences: Iterator[str], room: int) -> list[list[int]]:
    """Sentences of exactly ``room`` tokens together; the first one lacks its beginning, if need be."""
    hay: list[list[int]] = []
    while room > 0:
        hay.insert(0, scorer.encode_more(" " + next(sentences))[-room:])
        room -= len(hay[0])
    return hay


def _boundary(hay: Sequence[Sequence[int]], depth: float) -> int:
    """Number of the sentence before which ``depth`` of the tokens have passed, as nearly as sentences allow."""
    ends = [0]
    for sentence in hay:
        ends.append(ends[-1] + len(sentence))
    return min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))


def _generated(draw: random.Random) -> Iterator[str]:
    while True:
        yield (
            f"The {draw.choice(_WHO)} {draw.choice(_DID)} the {draw.choice(_HOW)} {draw.choice(_WHAT)} "
            f"{draw.choice(_WHEN)}."
        )


def _sentences_of(file: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"haystack={file!r}: cannot be read ({error}); give a UTF-8 text") from None
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    if not any(sentences):
        raise ConfigError(f"haystack={file!r}: no sentence in it; give a text")
    return sentences


def _cycle(sentences: list[str], draw: random.Random) -> Iterator[str]:
    """Backwards from a random place, since the hay is filled from its end: the text's own order."""
    at = draw.randrange(len(sentences))
    while True:
        yield sentences[at % len(sentences)]
        at -= 1
