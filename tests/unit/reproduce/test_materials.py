"""Public files as the experiments read them."""

import json
from pathlib import Path

import pytest

from lrdint_tune.reproduce import materials


def test_only_newlines_end_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materials, "is_complete", lambda folder: True)  # the model is not of interest
    question = "How many\u2028or\u0085so?"
    problem = json.dumps({"question": question, "answer": "2"}, ensure_ascii=False) + "\n"
    passage = json.dumps({"context": question, "continuation": "b"}, ensure_ascii=False) + "\n"
    for name, content in {"gsm8k/train": problem, "gsm8k/test": problem * 2, "eval/lambada_openai": passage}.items():
        file = tmp_path / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    materials.prepare("smollm2_135m", tmp_path / "data", tmp_path / "out")
    found = {file.stem: file.read_text().strip().split("\n") for file in (tmp_path / "out").glob("*.jsonl")}
    assert [json.loads(row)["question"] for row in found["heldout"]] == [question] * 2
    assert [json.loads(row)["context"] for row in found["lambada"]] == [question]
