"""Prompts word for word, metrics from known likelihoods, and what is wrong with rows."""

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.scoring import Score, Scorer
from lrdint_tune.evaluation.tasks import build_tasks
from lrdint_tune.evaluation.tasks.items import Choices, read_items
from lrdint_tune.evaluation.tasks.lambada import LAYOUTS
from lrdint_tune.evaluation.tasks.multiple_choice import TASKS

NO_YES = ["no", "yes"]
# task -> row, context, answers, gold
CASES: list[tuple[str, dict[str, Any], str, list[str], int]] = [
    (
        "arc_easy",
        {"query": "Question: Why?", "choices": ["a", "b"], "gold": 1},
        "Question: Why?\nAnswer:",
        ["a", "b"],
        1,
    ),
    (
        "arc_challenge",
        {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: Why?\nAnswer:",
        ["a", "b"],
        1,
    ),
    (
        "boolq",
        {"query": "Passage: It rains.\nQuestion: is it wet?", "choices": NO_YES, "gold": 1},
        "It rains.\nQuestion: is it wet?\nAnswer:",
        NO_YES,
        1,
    ),
    (
        "boolq",
        {"passage": "It rains.", "question": "is it wet", "label": 1},
        "It rains.\nQuestion: is it wet?\nAnswer:",
        NO_YES,
        1,
    ),
    (
        "hellaswag",
        {
            "activity_label": "Bowls",
            "ctx_a": "[header] How to [title] grip.",
            "ctx_b": "you hold",
            "endings": ["it [step] so.", "[title] on"],
            "label": "1",
        },
        "Bowls: How to. grip. You hold",
        ["it so.", " on"],
        1,
    ),
    ("openbookqa", {"query": "Fog is", "choices": ["a", "b"], "gold": 0}, "Fog is", ["a", "b"], 0),
    (
        "openbookqa",
        {"question_stem": "Fog is", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B "},
        "Fog is",
        ["a", "b"],
        1,
    ),
    (
        "wic",
        {
            "sentence1": "A class act.",
            "sentence2": "Two classes.",
            "start1": 2,
            "end1": 7,
            "label": "true",
            "word": "x",
        },
        "Sentence 1: A class act.\nSentence 2: Two classes.\nQuestion: Is the word 'class' used in the same way in the "
        "two sentences above?\nAnswer:",
        NO_YES,
        1,
    ),
    (
        "wsc",
        {
            "text": "Bernard , who lost it , saw him .",
            "target": {"span1_text": "Bernard", "span2_text": "him", "span2_index": 7},
            "label": "false",
        },
        'Passage: Bernard, who lost it, saw *him*.\nQuestion: In the passage above, does the pronoun "*him*" refer to '
        '"*Bernard*"?\nAnswer:',
        NO_YES,
        0,
    ),
    (
        "wsc",
        {"text": "Ann saw her .", "span1_text": "Ann", "span2_text": "her", "span2_index": 2, "label": 1},
        'Passage: Ann saw *her*.\nQuestion: In the passage above, does the pronoun "*her*" refer to "*Ann*"?\nAnswer:',
        NO_YES,
        1,
    ),
    ("piqa", {"goal": "Open it", "sol1": "a", "sol2": "b", "label": 0}, "Question: Open it\nAnswer:", ["a", "b"], 0),
    (
        "siqa",
        {"context": "Ann left.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "Q: Ann left. Why?\nA:",
        ["a", "b", "c"],
        2,
    ),
]


def write(folder: Path, *rows: Any) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(("task", "row", "context", "answers", "gold"), CASES)
def test_prompts(tmp_path: Path, task: str, row: Any, context: str, answers: list[str], gold: int) -> None:
    (item,) = read_items(write(tmp_path, row), TASKS[task].layouts, None)
    assert item == Choices([(context, f" {answer}") for answer in answers], [len(a) for a in answers], gold)


def test_every_task_has_a_prompt_above() -> None:
    assert {case[0] for case in CASES} | {"winogrande"} == TASKS.keys()


@pytest.mark.parametrize(
    "row",
    [
        {"context_options": ["Ann met Bo since Ann", "Ann met Bo since Bo"], "continuation": "was late.", "gold": 1},
        {"sentence": "Ann met Bo since _ was late.", "option1": "Ann", "option2": "Bo", "answer": "2"},
    ],
)
def test_winogrande_scores_what_follows_the_option(tmp_path: Path, row: Any) -> None:
    (item,) = read_items(write(tmp_path, row), TASKS["winogrande"].layouts, None)
    assert item.pairs == [("Ann met Bo since Ann", " was late."), ("Ann met Bo since Bo", " was late.")]
    assert item.gold == 1


@pytest.mark.parametrize("row", [{"text": "He took the ball"}, {"context": "He took the", "continuation": "ball"}])
def test_lambada(tmp_path: Path, row: Any) -> None:
    assert read_items(write(tmp_path, row), LAYOUTS, None) == [("He took the", " ball")]


def test_lambada_keeps_line_ends_before_the_word(tmp_path: Path) -> None:
    """The file has one such item; lm-eval scores them too."""
    row = {"context": "and saw the", "continuation": "\n\nrecorder"}
    assert read_items(write(tmp_path, row), LAYOUTS, None) == [("and saw the", " \n\nrecorder")]


SEPARATORS = "\u2028 \u0085 \x0b \x1c"  # where str.splitlines cuts too


def test_only_newlines_end_a_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    texts = [f"a{SEPARATORS}b", "c d"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_text("\n\n".join(lines), encoding="utf-8")
    found = read_items(str(file), LAYOUTS, None)
    assert ["".join(pair) for pair in found] == texts


class Known:
    """A scorer that was told the answers."""

    def __init__(self, *scores: Score) -> None:
        self.scores = scores

    def score(self, pairs: list[tuple[str, str]]) -> list[Score]:
        assert len(pairs) == len(self.scores)
        return list(self.scores)


def test_accuracies(tmp_path: Path) -> None:
    row = {"query": "q", "choices": ["ab", "abcdefgh"], "gold": 1}
    file = write(tmp_path, row, row, {**row, "gold": 0})
    # By likelihood the first answer wins each time, by likelihood per character the second one.
    scores = [Score(ll, False, 1) for ll in (-2.0, -4.0, -1.0, -1.5, -1.0, -4.0)]
    measured = TASKS["arc_easy"].measure(cast(Scorer, Known(*scores)), file, None)
    assert measured.items["acc"].values == [0, 0, 1]
    assert measured.items["acc_norm"].values == [1, 1, 1]
    estimate = measured.items["acc"].estimate()
    assert (estimate.mean, estimate.stderr) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert measured.details["log_likelihoods"] == [[-2, -4], [-1, -1.5], [-1, -4]]


def test_lambada_perplexity(tmp_path: Path) -> None:
    file = write(tmp_path, {"text": "a b"}, {"text": "a c"})
    known = cast(Scorer, Known(Score(-1.0, True, 2), Score(-3.0, False, 1)))
    (task,) = build_tasks([{"task": "lambada", "file": file}]).values()
    measured = task.measure(known, 0)
    assert measured.items["acc"].values == [1, 0]
    # exp(mean NLL); its standard error is that times the one of the mean
    assert measured.derived["perplexity"].mean == pytest.approx(math.exp(2))
    assert measured.derived["perplexity"].stderr == pytest.approx(math.exp(2) * 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"rows.jsonl:1: not valid JSON"),
        ('{"goal": "x"}', r"rows.jsonl:1: columns goal; this task reads query, choices, gold or question, choices"),
        ('{"query": "x", "choices": ["a"], "gold": "b"}', r"rows.jsonl:1: ValueError"),
        ("\n", "holds no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_items(str(file), TASKS["arc_easy"].layouts, None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("arc_easy", r"tasks\[0\]='arc_easy': has no task"),
        ({"task": "arc"}, r"tasks\[0\].task='arc': unknown; choose from arc_easy"),
        ({"task": "arc_easy", "file": "nowhere.jsonl"}, r"tasks\[0\], arc_easy: file='nowhere.jsonl': no such file"),
        ({"task": "arc_easy"}, "file: missing"),
        ({"task": "arc_easy", "file": __file__, "limit": 1}, "limit=1: must be at least 2"),
        ({"task": "arc_easy", "file": __file__, "fiel": 1}, "unknown key fiel=1; did you mean file"),
        ({"task": "arc_easy", "file": __file__, "source": "hub"}, "source='hub': unknown"),
        ({"task": "nll", "dataset": {}}, "has no _component_"),
        ({"task": "wikitext", "file": __file__, "window": 1}, "window=1"),
        ({"task": "needle", "candidates": 1}, "candidates=1: must be from 2"),
        ({"task": "needle", "depths": [2.0]}, "depths="),
        ({"task": "needle", "haystack": "nowhere"}, "haystack='nowhere'"),
    ],
)
def test_bad_entries_are_named(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tasks([entry])


def test_two_entries_of_one_name() -> None:
    with pytest.raises(ConfigError, match=r"tasks\[1\].name='needle': is taken"):
        build_tasks([{"task": "needle"}, {"task": "needle", "needles": 2}])
    assert list(build_tasks([{"task": "needle"}, {"task": "needle", "name": "two", "needles": 2}])) == ["needle", "two"]
