"""Questions with several answers: the likeliest one is the model's. Prompts are those of lm-eval 0.4.13, word for word.

Each task reads the hub's own columns, and those of llm-foundry's copies of the same sets where they differ (``query``,
``choices``, ``gold``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrdint_tune.evaluation.measured import Measured, Values
from lrdint_tune.evaluation.scoring import Scorer
from lrdint_tune.evaluation.tasks.items import Choices, Layout, Row, choices, options, read_items

_QUERY = ("query", "choices", "gold")
_NO_YES = ["no", "yes"]


@dataclass(frozen=True)
class MultipleChoice:
    """A task.

    Attributes:
        layouts: the forms its rows may have.
        normalised: whether ``acc_norm`` is measured beside ``acc``.
    """

    layouts: tuple[Layout[Choices], ...]
    normalised: bool = False

    def measure(self, scorer: Scorer, file: str, limit: int | None) -> Measured:
        """``acc``: whether the right answer has the largest log-likelihood; ``acc_norm``: whether it has the largest
        one divided by the number of its characters. Of equal ones the first counts.

        Raises:
            ConfigError: see :func:`~lrdint_tune.evaluation.tasks.items.read_items`.
        """
        items = read_items(file, self.layouts, limit)
        scores = iter(scorer.score([pair for item in items for pair in item.pairs]))
        likelihoods = [[next(scores).log_likelihood for _ in item.pairs] for item in items]
        measured = {"acc": Values([_right(ll, item) for ll, item in zip(likelihoods, items, strict=True)])}
        if self.normalised:
            by_length = [np.divide(ll, item.lengths) for ll, item in zip(likelihoods, items, strict=True)]
            measured["acc_norm"] = Values([_right(ll, item) for ll, item in zip(by_length, items, strict=True)])
        return Measured(measured, details={"log_likelihoods": likelihoods})


def _right(likelihoods: Any, item: Choices) -> float:
    return float(int(np.argmax(likelihoods)) == item.gold)


def _gold(row: Row) -> int:
    """Of ``label``: a number, a flag, or either as text."""
    label = str(row["label"]).lower()
    return ("false", "true").index(label) if label in ("false", "true") else int(label)


def _lettered(prompt: str, question: str) -> Layout[Choices]:
    """The hub's ARC and OpenBookQA: answers with letters, and the right one's letter."""

    def read(row: Row) -> Choices:
        gold = row["choices"]["label"].index(row["answerKey"].strip())
        return choices(prompt.format(row[question]), row["choices"]["text"], gold)

    return Layout((question, "choices", "answerKey"), read)


def _arc() -> MultipleChoice:
    # "Question: " stands in the query already.
    query = Layout(_QUERY, lambda row: choices(f"{row['query']}\nAnswer:", row["choices"], row["gold"]))
    return MultipleChoice((query, _lettered("Question: {}\nAnswer:", "question")), normalised=True)


def _boolq_query(row: Row) -> Choices:
    # lm-eval's prompt has no "Passage: " before the passage.
    return choices(f"{row['query'].removeprefix('Passage: ')}\nAnswer:", row["choices"], row["gold"])


def _boolq(row: Row) -> Choices:
    return choices(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", _NO_YES, _gold(row))


def _clean(text: str) -> str:
    """HellaSwag's texts from WikiHow carry marks in brackets."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag(row: Row) -> Choices:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choices(_clean(context), [_clean(ending) for ending in row["endings"]], int(row["label"]))


def _wic(row: Row) -> Choices:
    word = row["sentence1"][row["start1"] : row["end1"]]
    prompt = (
        f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\nQuestion: Is the word '{word}' used in the "
        "same way in the two sentences above?\nAnswer:"
    )
    return choices(prompt, _NO_YES, _gold(row))


def _winogrande(row: Row) -> Choices:
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return options(contexts, after.strip(), ("1", "2").index(str(row["answer"])))


def _wsc(text: str, noun: str, pronoun: str, word_index: int, gold: int) -> Choices:
    before = " ".join(text.split()[:word_index])
    after = text[len(before) + len(pronoun) + 1 :]
    prompt = (
        f"Passage: {_joined(f'{before} *{pronoun}*{after}')}\nQuestion: In the passage above, does the pronoun "
        f'"*{pronoun}*" refer to "*{noun}*"?\nAnswer:'
    )
    return choices(prompt, _NO_YES, gold)


def _joined(text: str) -> str:
    """Text whose words, quotation marks and stops stand apart, as it is written ordinarily: lm-eval's own order of
    replacements."""
    for apart, joined in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        text = text.replace(apart, joined)
    return re.sub(r" (['.,])", r"\1", text)


def _wsc_nested(row: Row) -> Choices:
    target = row["target"]
    return _wsc(row["text"], target["span1_text"], target["span2_text"], target["span2_index"], _gold(row))


def _wsc_flat(row: Row) -> Choices:
    return _wsc(row["text"], row["span1_text"], row["span2_text"], row["span2_index"], _gold(row))


def _piqa(row: Row) -> Choices:
    return choices(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], _gold(row))


def _siqa(row: Row) -> Choices:
    answers = [row["answerA"], row["answerB"], row["answerC"]]
    return choices(f"Q: {row['context']} {row['question']}\nA:", answers, int(row["label"]) - 1)


TASKS: dict[str, MultipleChoice] = {
    "arc_easy": _arc(),
    "arc_challenge": _arc(),
    "boolq": MultipleChoice((Layout(_QUERY, _boolq_query), Layout(("passage", "question", "label"), _boolq))),
    "hellaswag": MultipleChoice(
        (Layout(("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag),), normalised=True
    ),
    "openbookqa": MultipleChoice(
        (
            Layout(_QUERY, lambda row: choices(row["query"], row["choices"], row["gold"])),
            _lettered("{}", "question_stem"),
        ),
        normalised=True,
    ),
    "wic": MultipleChoice((Layout(("sentence1", "sentence2", "start1", "end1", "label"), _wic),)),
    "winogrande": MultipleChoice(
        (
            Layout(
                ("context_options", "continuation", "gold"),
                lambda row: options(row["context_options"], row["continuation"], row["gold"]),
            ),
            Layout(("sentence", "option1", "option2", "answer"), _winogrande),
        )
    ),
    "wsc": MultipleChoice(
        (
            Layout(("text", "target", "label"), _wsc_nested),
            Layout(("text", "span1_text", "span2_text", "span2_index", "label"), _wsc_flat),
        )
    ),
    "piqa": MultipleChoice((Layout(("goal", "sol1", "sol2", "label"), _piqa),), normalised=True),
    "siqa": MultipleChoice((Layout(("context", "question", "answerA", "answerB", "answerC", "label"), _siqa),)),
}
