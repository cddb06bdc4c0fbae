"""The same numbers from our code and from lm-eval's, on the same rows."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.loading import Loaded
from lrdint_tune.evaluation.run import evaluate_model
from lrdint_tune.evaluation.tasks import build_tasks

# Rows in the hub's columns, which lm-eval's own tasks read.
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {
            "question": f"Which of the {n} is it?",
            "choices": {"text": ["a b", f"the river {n}", "no"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[n % 3],
        }
        for n in range(6)
    ],
    "winogrande": [
        {"sentence": f"Ann met {n} friends, so _ was late.", "option1": "Ann", "option2": "they", "answer": "12"[n % 2]}
        for n in range(6)
    ],
    "lambada": [{"text": f"It was the {n} river that he saw"} for n in range(6)],
    "hellaswag": [
        {
            "ind": n,
            "activity_label": "Bowls",
            "ctx_a": f"[header] How to play {n} [title] Take it.",
            "ctx_b": "then you",
            "ctx": "",
            "endings": ["run [step] on.", "hold  it", "[title] stop"],
            "label": str(n % 3),
        }
        for n in range(6)
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS)
def test_same_numbers(loaded: Loaded, tmp_path: Path, task: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    entries = [{"task": task, "file": str(file), "source": source, "name": source} for source in ("file", "lm_eval")]
    results = evaluate_model(loaded.model, loaded.tokenizer, entries, device="cpu")
    ours, theirs = results["file"], results["lm_eval"]
    assert theirs["items"].items() <= ours["items"].items() and "acc" in theirs["items"]
    for metric, estimate in theirs["metrics"].items():
        assert estimate == pytest.approx(ours["metrics"][metric])
        assert theirs["lm_eval"][f"{metric},none"] == pytest.approx(ours["metrics"][metric]["mean"])
        assert theirs["lm_eval"][f"{metric}_stderr,none"] == pytest.approx(ours["metrics"][metric]["stderr"])
    if task == "lambada":
        assert theirs["lm_eval"]["perplexity,none"] == pytest.approx(ours["metrics"]["perplexity"]["mean"], rel=1e-5)


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)  # its import raises ImportError
    with pytest.raises(ConfigError, match=r"lm-eval cannot be imported .*pip install 'lrdint-tune\[lm-eval\]'"):
        build_tasks([{"task": "arc_easy", "source": "lm_eval"}])
