"""Reading local files and loading datasets: what is accepted, and every error a user can meet."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import pytest
from omegaconf import OmegaConf

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.data import TokenisedDataset, sft_dataset, text_dataset
from tests.unit.data.byte_tokenizer import ByteTokenizer

GOOD = '{"q": "1", "a": "2"}\n'


def sft(data_files: Any, **options: Any) -> TokenisedDataset:
    return sft_dataset(
        ByteTokenizer(),
        **{
            "source": "json",
            "data_files": data_files,
            "prompt_column": "q",
            "response_column": "a",
            "max_seq_len": 64,
            **options,
        },
    )


def texts(data: TokenisedDataset) -> list[str]:
    return [bytes(data[i]["tokens"][1:-1].tolist()).decode() for i in range(len(data))]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str | bytes], str]:
    def write(content: str | bytes, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what is accepted


def test_lines_an_array_and_a_compressed_file_hold_the_same_rows(file: Any, tmp_path: Path) -> None:
    rows = [{"q": "é\u2028", "a": str(i), "extra": i} for i in range(3)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    expected = ["é\u20280", "é\u20281", "é\u20282"]
    assert texts(sft(file(lines))) == expected
    assert texts(sft(file("\r\n" + json.dumps(rows, indent=2), "rows.json"))) == expected
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert texts(sft(tmp_path / "rows.jsonl.gz")) == expected


def test_text_is_not_guessed_to_be_something_else(file: Any) -> None:
    """Dates and numbers in text columns stay text."""
    assert texts(sft(file('{"q": "2020-01-01 00:00:00", "a": "1"}'))) == ["2020-01-01 00:00:001"]


def test_other_columns_may_differ_between_rows_and_files(file: Any) -> None:
    first = file('{"q": "1", "a": "2", "x": 1}\n{"q": "3", "a": "4", "x": {"y": [null]}}\n', "a.jsonl")
    assert texts(sft([first, file('{"a": "6", "q": "5"}', "b.jsonl")])) == ["12", "34", "56"]


def test_patterns_and_config_lists(file: Any, tmp_path: Path) -> None:
    paths = [file(json.dumps({"q": "", "a": str(i)}), f"part-{i}.jsonl") for i in (2, 0, 1)]
    assert texts(sft(f"{tmp_path}/part-*.jsonl")) == ["0", "1", "2"]  # patterns in the order of the names
    assert texts(sft(OmegaConf.create(paths))) == ["2", "0", "1"]  # lists as given


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", "0123456789"),
        ("train[:30%]", "012"),
        ("train[30%:]", "3456789"),
        ("train[-2:]", "89"),
        ("train[:1]+train[9:]", "09"),
    ],
)
def test_slices_of_local_files(file: Any, split: str, expected: str) -> None:
    path = file("".join(json.dumps({"q": "", "a": str(i)}) + "\n" for i in range(10)))
    assert "".join(texts(sft(path, split=split))) == expected


def test_num_rows(file: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = file(GOOD * 5)
    assert len(sft(path, num_rows=2)) == 2
    assert not caplog.records
    assert len(sft(path, num_rows=9)) == 5
    assert "dataset.num_rows=9 has no effect: there are only 5 rows" in caplog.text
    with pytest.raises(ConfigError, match="dataset.num_rows=0: must be at least 1"):
        sft(path, num_rows=0)


def test_setting_without_effect_warns(file: Any, caplog: pytest.LogCaptureFixture) -> None:
    sft(file(GOOD), name="main")
    assert "dataset.name='main' has no effect on local files" in caplog.text


def test_a_folder_laid_out_like_a_hub_dataset(tmp_path: Path) -> None:
    """The shape of OpenMathInstruct-2: many splits, of which one is read by naming its files."""
    folder = tmp_path / "hub"
    for split in ("train", "train_1M"):
        rows = hf_datasets.Dataset.from_dict({"q": [split], "a": ["x"], "n": [1]})
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    splits = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "train_1M"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    source = str(folder)
    assert texts(sft(None, source=source, split="train_1M")) == ["train_1Mx"]
    assert texts(sft("data/train_1M-*.parquet", source=source)) == ["train_1Mx"]
    assert texts(sft(OmegaConf.create({"s": "data/train_1M-*"}), source=source, split="s[:100%]")) == ["train_1Mx"]
    with pytest.raises(ConfigError, match="split='nope': cannot be loaded .*Unknown split.*dataset.source=json"):
        sft(None, source=source, split="nope")


# ---------------------------------------------------------------- missing and unreadable files


@pytest.mark.parametrize("source", ["json", "text"])
def test_missing_file(tmp_path: Path, source: str) -> None:
    path = str(tmp_path / "x.json")
    kind = "JSON or JSONL" if source == "json" else "text"
    with pytest.raises(ConfigError) as error:
        text_dataset(ByteTokenizer(), source=source, data_files=path, max_seq_len=8)
    assert one_line(error) == f"dataset.data_files={path!r}: no such file; give the path of a {kind} file"


def test_one_of_two_files_missing(file: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no-\*\.jsonl': no such file"):
        sft([file(GOOD), str(tmp_path / "no-*.jsonl")])


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory; give the path of a JSON or JSONL file"):
        sft(str(tmp_path))


@pytest.mark.parametrize("value", [None, [], {"train": "x.json"}])
def test_no_files_given(value: Any) -> None:
    with pytest.raises(ConfigError, match="dataset.data_files=.*: dataset.source='json' reads local files; give"):
        sft(value)


def test_broken_compressed_file(file: Any) -> None:
    with pytest.raises(ConfigError, match=r"rows.jsonl.gz': cannot be read \(Not a gzipped file"):
        sft(file("no", "rows.jsonl.gz"))
    with pytest.raises(ConfigError, match=r"t.txt.gz': cannot be read \("):
        text_dataset(ByteTokenizer(), data_files=file(gzip.compress(b"abc" * 99)[:-10], "t.txt.gz"), max_seq_len=8)


# ---------------------------------------------------------------- bad content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD + '{"q": "1", "a": }\n' + GOOD, "line 2 is not valid JSON (Expecting value, column 17)"),
        (GOOD + "\n\n{", "line 4 is not valid JSON ("),
        ('[\n{"q": "1", "a": "2"},\n{"q" "1"}\n]', "line 3 is not valid JSON (Expecting ':' delimiter, column 6)"),
        ('{\n "q": "1",\n "a": "2"\n}\n', "line 1 is not valid JSON ("),
        (GOOD.encode() + b'{"q": "\xff", "a": "2"}\n', "line 2 is not valid JSON (not UTF-8: invalid start byte)"),
        (b'[\n{"q": "\xff", "a": "2"}]', "line 2 is not valid JSON (not UTF-8: invalid start byte)"),
    ],
)
def test_invalid_json_names_file_and_line(file: Any, content: str | bytes, expected: str) -> None:
    path = file(content)
    with pytest.raises(ConfigError) as error:
        sft(path)
    message = one_line(error)
    assert f"dataset.data_files={path!r}: {expected}" in message
    assert message.endswith("write one object per line, or one array of objects")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD + '{"q": "1", "b": "2"}', "row 1 (line 2 of {path!r}): no column 'a'; it has 'q', 'b'; correct"),
        (GOOD + "{}", "row 1 (line 2 of {path!r}): no column 'q'; it has no columns; correct"),
        ("\n" + GOOD + "[1]", "row 1 (line 3 of {path!r}): holds a list; expected an object with 'q', 'a'"),
        ('{"q": "1", "a": 2}', "row 0 (line 1 of {path!r}): column 'a' holds int; expected text"),
        ('{"q": "1", "a": null}', "row 0 (line 1 of {path!r}): column 'a' holds null; expected text"),
        ('[{"q": "1", "a": "2"}, {"q": ["1"]}]', "row 1 ({path!r}): column 'q' holds list; expected text"),
        ('{"q": "\\ud83d", "a": "2"}', "row 0 (line 1 of {path!r}): column 'q' is not Unicode (surrogates not"),
    ],
)
def test_bad_row_names_row_line_and_column(file: Any, content: str, expected: str) -> None:
    path = file(content)
    with pytest.raises(ConfigError) as error:
        sft(path)
    assert one_line(error).startswith(expected.format(path=path))


def test_rows_count_over_all_files(file: Any) -> None:
    first, second = file(GOOD * 3, "a.jsonl"), file(GOOD + "{}", "b.jsonl")
    with pytest.raises(ConfigError) as error:
        sft([first, second])
    assert one_line(error).startswith(f"row 4 (line 2 of {second!r})")


@pytest.mark.parametrize(("content", "name"), [("", "e.jsonl"), ("[]", "e.json"), ("\n \n", "e.jsonl")])
def test_empty_json(file: Any, content: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"dataset.data_files='.*{name}': no rows; give files with rows"):
        sft(file(content, name))


def test_empty_text_and_empty_slice(file: Any) -> None:
    with pytest.raises(ConfigError, match=r"dataset.data_files='.*': no rows; give files with rows"):
        text_dataset(ByteTokenizer(), data_files=file(" \n"), max_seq_len=8)
    with pytest.raises(ConfigError, match=r"dataset.split='train\[1:\]': no rows"):
        sft(file(GOOD), split="train[1:]")


def test_text_that_is_not_utf8(file: Any) -> None:
    path = file(b"one\ntwo\n\xff", "t.txt")
    with pytest.raises(ConfigError, match=r"t.txt': line 3 is not UTF-8; convert the file"):
        text_dataset(ByteTokenizer(), data_files=path, max_seq_len=8)


# ---------------------------------------------------------------- bad options


@pytest.mark.parametrize("split", ["validation", "train[:x]", "train[200%:]", ""])
def test_split_local_files_do_not_have(file: Any, split: str) -> None:
    with pytest.raises(ConfigError) as error:
        sft(file(GOOD), split=split)
    assert one_line(error) == (
        f"dataset.split={split!r}: local files have the one split 'train'; give train, or a slice such as train[:95%]"
    )


@pytest.mark.parametrize(("separator", "expected"), [("(", "not a regular expression"), ("(a)", "capturing group")])
def test_bad_separator(file: Any, separator: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"dataset.document_separator='.*': .*{expected}"):
        text_dataset(ByteTokenizer(), data_files=file("a"), max_seq_len=8, document_separator=separator)


def test_separator_without_text_files(file: Any) -> None:
    with pytest.raises(ConfigError, match="dataset.document_separator='x': only for dataset.source=text; remove it"):
        text_dataset(ByteTokenizer(), source="json", data_files=file(GOOD), max_seq_len=8, document_separator="x")


def test_column_that_a_loaded_dataset_lacks(file: Any) -> None:
    path = file("q,b\n1,2\n", "rows.csv")
    with pytest.raises(ConfigError) as error:
        sft(path, source="csv")
    assert one_line(error) == (
        "dataset.source='csv': no row has the column 'a'; the rows have 'q', 'b'; "
        "correct the column names in the config"
    )


def test_loaded_column_that_is_not_text(file: Any) -> None:
    path = file("q,a\nx,1\nx,2\n", "rows.csv")
    with pytest.raises(ConfigError) as error:
        sft(path, source="csv")
    assert one_line(error) == (
        f"row 0 of 'csv' {path!r} split 'train': column 'a' holds int; expected text; correct or remove the row"
    )


def test_no_hub(file: Any) -> None:
    with pytest.raises(ConfigError) as error:
        sft(None, source="nobody/nothing", split="train_1M")
    message = one_line(error)
    assert message.startswith("dataset.source='nobody/nothing', split='train_1M': cannot be loaded (ConnectionError: ")
    assert message.endswith("or use local files: dataset.source=json dataset.data_files=<path>")


def test_long_message_of_the_hub_client_stays_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("first\nsecond " + "x" * 1000)

    monkeypatch.setattr("lrdint_tune.training.data.sources.datasets.load_dataset", refuse)
    with pytest.raises(ConfigError, match=r"cannot be loaded \(RuntimeError: first second x+\); check") as error:
        sft(None, source="a/b")
    assert len(one_line(error)) < 600


def test_missing_dataset_folder() -> None:
    with pytest.raises(ConfigError, match=r"dataset.source='./nowhere': no such folder"):
        sft(None, source="./nowhere")


def test_split_that_names_no_split(tmp_path: Path, file: Any) -> None:
    with pytest.raises(ConfigError, match="dataset.split=None: must name one split"):
        sft(file("q,a\nx,y\n", "rows.csv"), source="csv", split=None)
