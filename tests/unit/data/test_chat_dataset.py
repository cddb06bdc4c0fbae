"""Which tokens of a conversation are trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.data import TokenisedDataset, chat_dataset
from tests.unit.data.byte_tokenizer import BOS, EOS, ByteTokenizer, ids


def build(folder: Path, *conversations: Any, **options: Any) -> TokenisedDataset:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"messages": c}) for c in conversations))
    arguments = {"max_seq_len": 200, "cache_dir": str(folder / "cache"), **options}
    return chat_dataset(ByteTokenizer(), source="json", data_files=str(file), **arguments)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATION = [turn("user", "hi"), turn("assistant", "yes"), turn("user", "{x}"), turn("assistant", "no")]


def test_only_the_last_answer_is_trained(tmp_path: Path) -> None:
    example = build(tmp_path, [*CONVERSATION, turn("user", "dropped")])[0]
    prompt = ids("<|user|>\nhi\n<|assistant|>\nyes\n<|user|>\n{x}\n<|assistant|>\n")
    assert example["tokens"].tolist() == [BOS, *prompt, *ids("no\n"), EOS]
    assert example["labels"].tolist() == [-100] * len(prompt) + [*ids("no\n"), EOS, -100]


def test_turn_template(tmp_path: Path) -> None:
    example = build(tmp_path, CONVERSATION[:2], turn_template="[{role}] {content}")[0]
    assert example["tokens"].tolist() == [BOS, *ids("[user] hi[assistant] yes"), EOS]
    with pytest.raises(ConfigError, match="turn_template"):
        build(tmp_path, CONVERSATION, turn_template="{content}")


@pytest.mark.parametrize(("bad", "words"), [([turn("user", "hi")], "assistant"), ([], "assistant")])
def test_a_row_without_an_answer(tmp_path: Path, bad: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build(tmp_path, CONVERSATION, bad)
    assert "row 1" in str(caught.value)


def test_a_column_that_is_no_conversation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="role, content"):
        build(tmp_path, "just text")
