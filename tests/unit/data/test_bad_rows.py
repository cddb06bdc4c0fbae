"""``on_bad_row: skip``: what is left out, what is said about it, and that the other rows stay the ones they were."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import pytest

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.data import TokenisedDataset, chat_dataset, sft_dataset, text_dataset
from tests.unit.data.byte_tokenizer import ByteTokenizer


def line(number: int) -> str:
    return json.dumps({"q": "Q", "a": str(number)})


BAD = {
    "invalid JSON": ("{oops", "line 2 is not valid JSON (Expecting property name"),
    "endless nesting": ("[" * 200_000, "line 2 is not valid JSON ("),
    "endless number": ('{"q": ' + "1" * 5000 + "}", "line 2 is not valid JSON ("),
    "not UTF-8": (b'{"q": "\xff", "a": "2"}', "line 2 is not valid JSON (not UTF-8"),
    "not an object": ('"text"', "row 1 (line 2 of {path!r}): holds a str; expected an object with 'q', 'a'"),
    "missing column": ('{"q": "1"}', "row 1 (line 2 of {path!r}): no column 'a'; it has 'q'"),
    "wrong type": ('{"q": "1", "a": 2}', "row 1 (line 2 of {path!r}): column 'a' holds int; expected text"),
    "null": ('{"q": null, "a": "2"}', "row 1 (line 2 of {path!r}): column 'q' holds null; expected text"),
    "not Unicode": ('{"q": "\\ud83d", "a": "2"}', "row 1 (line 2 of {path!r}): column 'q' is not Unicode"),
}


def sft(path: Any, **options: Any) -> TokenisedDataset:
    given: dict[str, Any] = {"source": "json", "prompt_column": "q", "response_column": "a", "max_seq_len": 64}
    return sft_dataset(ByteTokenizer(), **{**given, "data_files": path, "on_bad_row": "skip", **options})


def answers(data: TokenisedDataset) -> list[str]:
    return [bytes(data[i]["tokens"][1:-1].tolist()).decode() for i in range(len(data))]


def write(folder: Path, *rows: str | bytes, name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_bytes(b"".join((row if isinstance(row, bytes) else row.encode()) + b"\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD)
def test_the_others_keep_their_numbers(
    tmp_path: Path, bad: str | bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, line(0), bad, line(2), line(3))
    with caplog.at_level(logging.INFO):
        data = sft(path)
    assert data.bad_rows == 1 and data.unlabelled == 0
    assert data.row_numbers.tolist() == [0, 2, 3]
    assert answers(data) == ["Q0", "Q2", "Q3"]
    assert "1 of 4 rows are bad and left out; the first:" in caplog.text
    assert reason.format(path=path) in caplog.text
    with pytest.raises(ConfigError) as error:  # what skip leaves out, error refuses in the same words
        sft(path, on_bad_row="error")
    assert reason.format(path=path) in str(error.value)


def test_equal_rows_equal_digest(tmp_path: Path) -> None:
    """Where nothing is bad, the option changes nothing; a checkpoint goes on with the other value."""
    path = write(tmp_path, line(0), line(1))
    assert sft(path).digest == sft(path, on_bad_row="error").digest
    assert sft(path).bad_rows == sft(path, on_bad_row="error").bad_rows == 0


def test_the_caches_keep_it(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, line(0), "{", line(2))
    sft(path)
    caplog.clear()
    monkeypatch.setattr("lrdint_tune.training.data.files._parse", None)  # nothing is read again
    data = sft(path)
    assert data.bad_rows == 1 and answers(data) == ["Q0", "Q2"]
    assert "line 2 is not valid JSON" in caplog.text


def test_only_the_first_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = sft(write(tmp_path, line(0), *["{"] * 9))
    assert data.bad_rows == 9
    assert caplog.text.count("is not valid JSON") == 5


def test_slices_and_limits_count_what_they_hold(tmp_path: Path) -> None:
    path = write(tmp_path, "{", line(1), line(2), "{")
    assert sft(path, num_rows=3).bad_rows == 1
    assert sft(path, split="train[1:3]").bad_rows == 0
    with pytest.raises(ConfigError, match=r"on_bad_row='skip': .*no row is good; the first: .*line 1 is not valid"):
        sft(path, num_rows=1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(["{", "{"], "all of its 2 rows are bad, the first: "), (['{"q": 1}'], "its only row is bad: ")],
)
def test_file_of_bad_rows(tmp_path: Path, content: list[str], reason: str) -> None:
    """Another file's good rows do not make up for it: most likely it is the wrong file."""
    good, bad = write(tmp_path, line(0), name="good.jsonl"), write(tmp_path, *content, name="bad.jsonl")
    with pytest.raises(ConfigError) as error:
        sft([good, bad])
    assert f"dataset.on_bad_row='skip': {bad!r}: {reason}" in str(error.value)


def test_what_is_no_row_is_still_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2 is not valid JSON"):
        sft(write(tmp_path, "[" + line(0) + ",", "{]"))
    whole = gzip.compress("\n".join(map(line, range(1000))).encode())
    broken = tmp_path / "rows.jsonl.gz"
    for content in (whole[:-20], whole[:40] + b"\0" * 40 + whole[80:]):
        broken.write_bytes(content)
        with pytest.raises(ConfigError, match=r"rows.jsonl.gz': cannot be read \("):
            sft(str(broken))


def test_array(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, f"[{line(0)}, 3, {line(2)}]", name="rows.json")
    assert answers(sft(path)) == ["Q0", "Q2"]
    assert f"row 1 ({path!r}): holds a int" in caplog.text


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


CONVERSATIONS = {
    "no list": ("hello", "is no list of {role, content}"),
    "no content": ([{"role": "assistant"}], "is no list of {role, content}"),
    "no assistant": (turns(("user", "a")), "has no turn of the assistant"),
    "content of a wrong type": (turns(("user", 3), ("assistant", "b")), "holds int; expected text"),
    "role of a wrong type": (turns((None, "a"), ("assistant", "b")), "holds null; expected text"),  # type: ignore[arg-type]
    "not Unicode": (turns(("assistant", "\ud83d")), "is not Unicode"),
}


@pytest.mark.parametrize(("bad", "reason"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations_name_file_and_line(
    tmp_path: Path, bad: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = turns(("user", "a"), ("assistant", "b"))
    path = write(tmp_path, *(json.dumps({"messages": row}) for row in (good, bad, good)))
    options: dict[str, Any] = {"source": "json", "data_files": path, "max_seq_len": 64}
    data = chat_dataset(ByteTokenizer(), on_bad_row="skip", **options)
    assert data.bad_rows == 1 and data.row_numbers.tolist() == [0, 2]
    where = f"row 1 (line 2 of {path!r}): column 'messages' "
    assert where + reason in caplog.text
    with pytest.raises(ConfigError) as error:
        chat_dataset(ByteTokenizer(), **options)
    assert str(error.value).startswith(where + reason)


def test_text_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "one", "--", b"t\xffo", "--", "three", name="t.txt")
    options: dict[str, Any] = {"data_files": path, "max_seq_len": 64, "document_separator": "--\n"}
    data = text_dataset(ByteTokenizer(), on_bad_row="skip", **options)
    assert data.bad_rows == 1 and answers(data) == ["one\n", "three\n"]
    assert f"{path!r}: line 3 is not UTF-8" in caplog.text
    with pytest.raises(ConfigError, match="t.txt': line 3 is not UTF-8"):
        text_dataset(ByteTokenizer(), **options)
    with pytest.raises(ConfigError, match="its only row is bad: .*line 3 is not UTF-8"):
        text_dataset(ByteTokenizer(), data_files=path, max_seq_len=64, on_bad_row="skip")


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_of_other_sources(tmp_path: Path, caplog: pytest.LogCaptureFixture, num_proc: int | None) -> None:
    """Rows of the hub come without files and lines: their number is told."""
    hf_datasets.Dataset.from_dict({"q": ["1", None, "3"], "a": ["x", "y", "z"]}).to_parquet(tmp_path / "rows.parquet")
    options: dict[str, Any] = {"source": "parquet", "num_proc": num_proc}
    data = sft(str(tmp_path / "rows.parquet"), **options)
    assert data.bad_rows == 1 and answers(data) == ["1x", "3z"]
    assert "row 1 of 'parquet'" in caplog.text and "column 'q' holds null; expected text" in caplog.text
    with pytest.raises(ConfigError, match="row 1 of 'parquet'.*column 'q' holds null"):
        sft(str(tmp_path / "rows.parquet"), on_bad_row="error", **options)


def test_dataset_of_bad_rows(tmp_path: Path) -> None:
    hf_datasets.Dataset.from_dict({"q": [1, 2], "a": ["x", "y"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"no row is good; the first: row 0 of 'parquet'.*holds int; expected text"):
        sft(str(tmp_path / "rows.parquet"), source="parquet")


def test_column_that_no_row_has(tmp_path: Path) -> None:
    hf_datasets.Dataset.from_dict({"q": ["1"], "b": ["x"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="no row has the column 'a'"):
        sft(str(tmp_path / "rows.parquet"), source="parquet")


def test_unknown_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset.on_bad_row='drop': unknown; give one of error, skip"):
        sft(write(tmp_path, line(0)), on_bad_row="drop")
