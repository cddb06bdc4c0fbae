"""Tokens, label masks, long rows and the cache of sft_dataset and text_dataset."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torchtune.modules.transforms.tokenizers import SentencePieceBaseTokenizer

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.data import TokenisedDataset, sft_dataset, text_dataset
from tests.unit.data.byte_tokenizer import BOS, EOS, ByteTokenizer, ids

Build = Callable[..., TokenisedDataset]


def lists(example: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    return example["tokens"].tolist(), example["labels"].tolist()


def test_labels_are_the_next_tokens_of_the_response_only(build: Build) -> None:
    tokens, labels = lists(build([("ab", "cd")])[0])
    assert tokens == [BOS, *ids("abcd"), EOS]
    # BOS predicts "a" and "a" predicts "b": prompt. "b" predicts the response's first token. EOS predicts nothing.
    assert labels == [-100, -100, ord("c"), ord("d"), EOS, -100]


def test_tensors_are_int64_and_own_their_memory(build: Build) -> None:
    example = build([("ab", "cd")])[0]
    assert example["tokens"].dtype == example["labels"].dtype == torch.int64
    example["tokens"].zero_()  # a view of the memory map would fault here


def test_templates_keep_other_braces(build: Build) -> None:
    data = build([(r"\frac{1}{2}", "{x}")], prompt_template="Q{0}: {prompt}\nA: ", response_template="{response}}")
    tokens, labels = lists(data[0])
    assert tokens == [BOS, *ids("Q{0}: \\frac{1}{2}\nA: {x}}"), EOS]
    assert [label for label in labels if label != -100] == [*ids("{x}}"), EOS]


def test_train_on_input_trains_all_but_the_last_position(build: Build) -> None:
    tokens, labels = lists(build([("ab", "cd")], train_on_input=True)[0])
    assert labels == [*tokens[1:], -100]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [BOS, *ids("abcd"), EOS]),
        ({"add_bos": True}, [BOS, *ids("abcd"), EOS]),
        ({"add_bos": False}, [*ids("abcd"), EOS]),
        ({"add_eos": False}, [BOS, *ids("abcd")]),
        ({"add_bos": False, "add_eos": False}, ids("abcd")),
    ],
)
@pytest.mark.parametrize("forced", [False, True])
def test_bos_and_eos_appear_exactly_once(
    build: Build, options: dict[str, bool], expected: list[int], forced: bool
) -> None:
    """Also with a tokenizer that puts BOS before every piece, as the tokenizer.json of Llama 3 does."""
    tokens, labels = lists(build([("ab", "cd")], ByteTokenizer(forced=forced), **options)[0])
    assert tokens == expected
    assert [label for label in labels if label != -100] == tokens[tokens.index(ord("c")) :]


def test_add_bos_by_default_follows_a_hugging_face_tokenizer(build: Build) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.hf_adds_bos = False
    assert build([("ab", "cd")], tokenizer)[0]["tokens"][0] == ord("a")


@pytest.mark.parametrize("missing", [None, -1])
def test_special_token_the_tokenizer_lacks(build: Build, missing: int | None) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.bos_id = missing  # type: ignore[assignment]
    assert build([("ab", "cd")], tokenizer)[0]["tokens"].tolist() == [*ids("abcd"), EOS]
    with pytest.raises(ConfigError, match=r"dataset.add_bos=true: .*set dataset.add_bos=false"):
        build([("ab", "cd")], tokenizer, add_bos=True)
    tokenizer.eos_id = missing  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"dataset.add_eos=true: .*set dataset.add_eos=false"):
        build([("ab", "cd")], tokenizer)


def test_counts_describe_the_examples(build: Build) -> None:
    data = build([("a" * i, "b" * (i % 3 + 1)) for i in range(50)])
    assert len(data) == 50
    assert data.token_counts.dtype == np.int64
    examples = [data[i] for i in range(50)]
    assert data.token_counts.tolist() == [len(example["tokens"]) for example in examples]
    assert data.label_counts.tolist() == [int((example["labels"] != -100).sum()) for example in examples]
    assert data.num_tokens == data.token_counts.sum() and data.num_labels == data.label_counts.sum()
    assert lists(data[-1]) == lists(examples[49])
    with pytest.raises(IndexError):
        data[50]


def test_rows_are_found_across_record_batches(build: Build) -> None:
    """Arrow holds a thousand rows per batch."""
    data = build([(str(i), "x") for i in range(2500)])
    for i in (0, 999, 1000, 1001, 1999, 2000, 2499):
        assert data[i]["tokens"].tolist() == [BOS, *ids(f"{i}x"), EOS]


def test_tokens_stay_in_the_memory_map(build: Build) -> None:
    data = build([(str(i), "x") for i in range(100)])
    assert all(not view.flags.owndata and not view.flags.writeable for view in data._ids)


def test_several_processes_tokenise_alike(build: Build) -> None:
    rows = [(str(i), "x" * (i % 7)) for i in range(40)]
    assert build(rows).digest == build(rows, num_proc=2, cache_dir=None, num_rows=40).digest


# ---------------------------------------------------------------- long rows


def test_long_row_is_an_error_that_says_everything(build: Build) -> None:
    rows = [("a", "b"), ("a" * 10, "b" * 5), ("a" * 20, "b")]
    with pytest.raises(
        ConfigError,
        match=r"^row 1 of 'json' .* 17 tokens, more than max_seq_len=8 \(2 of 3 rows are longer, the longest has 23\); "
        r"raise max_seq_len, remove the rows, or set dataset.long_rows=truncate$",
    ):
        build(rows, max_seq_len=8)


def test_a_row_of_exactly_max_seq_len_fits(build: Build) -> None:
    assert build([("ab", "cd")], max_seq_len=6).token_counts.tolist() == [6]
    with pytest.raises(ConfigError, match="6 tokens, more than max_seq_len=5"):
        build([("ab", "cd")], max_seq_len=5)


def test_truncation_cuts_the_end_and_reports(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = build([("ab", "cdef"), ("a", "b")], max_seq_len=5, long_rows="truncate")
    assert lists(data[0]) == ([BOS, *ids("abcd")], [-100, -100, ord("c"), ord("d"), -100])
    assert (data.truncated, data.unlabelled) == (1, 0)
    assert "1 of 2 rows truncated to 5 tokens" in caplog.text


def test_rows_without_trained_tokens_are_left_out_and_reported(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("a" * 20, "b"), ("a", "b"), ("a", ""), ("", "")]
    with caplog.at_level(logging.WARNING):
        data = build(rows, max_seq_len=8, long_rows="truncate", add_eos=False, add_bos=False)
    assert data.unlabelled == 3 and data.row_numbers.tolist() == [1] and len(data) == 1
    assert data[0]["tokens"].tolist() == ids("ab")
    assert "3 of 4 rows left out: no token to train on" in caplog.text


def test_no_trained_token_anywhere_is_an_error(build: Build) -> None:
    with pytest.raises(ConfigError, match="none of its 1 rows has a token to train on; give rows with a response"):
        build([("a" * 20, "b")], max_seq_len=8, long_rows="truncate")


@pytest.mark.parametrize("length", range(1, 22))
def test_splitting_a_document_loses_no_label(tmp_path: Path, length: int) -> None:
    text = "".join(chr(ord("a") + i) for i in range(length))
    (tmp_path / "t.txt").write_text(text)
    data = text_dataset(ByteTokenizer(), data_files=str(tmp_path / "t.txt"), max_seq_len=5, add_eos=False)
    whole = [BOS, *ids(text)]
    tokens = [token for i in range(len(data)) for token in data[i]["tokens"].tolist()]
    labels = [label for i in range(len(data)) for label in data[i]["labels"].tolist() if label != -100]
    assert tokens in (whole, whole[:-1])  # the last token needs no example of its own
    assert labels == whole[1:]
    assert data.token_counts.max() <= 5 and data.unlabelled == 0
    assert data.split == (length + 1 > 5)


@pytest.mark.parametrize(("long_rows", "function"), [("split", "sft"), ("cut", "sft"), ("cut", "text")])
def test_unknown_long_rows(build: Build, tmp_path: Path, long_rows: Any, function: str) -> None:
    with pytest.raises(ConfigError, match=rf"dataset.long_rows='{long_rows}': unknown; give one of .*error, truncate"):
        if function == "sft":
            build([("a", "b")], long_rows=long_rows)
        else:
            text_dataset(ByteTokenizer(), data_files="x.txt", max_seq_len=8, long_rows=long_rows)


def test_max_seq_len_too_small(build: Build) -> None:
    with pytest.raises(ConfigError, match="max_seq_len=1: must be at least 2"):
        build([("a", "b")], max_seq_len=1)


def test_template_without_placeholder(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"dataset.prompt_template='Question:': does not contain \{prompt\}"):
        build([("a", "b")], prompt_template="Question:")
    with pytest.raises(ConfigError, match=r"dataset.response_template='\{prompt\}': does not contain \{response\}"):
        build([("a", "b")], response_template="{prompt}")


def test_vocabulary_of_another_model(build: Build) -> None:
    data = build([("ab", "cd"), ("a", "é")], add_bos=False, add_eos=False)
    data.check_vocabulary(256)
    with pytest.raises(ConfigError, match=r"row 1 of .*: token id 195 is outside the model's vocabulary of 128; use"):
        data.check_vocabulary(128)


# ---------------------------------------------------------------- text


def test_documents_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n\ntwo\nthree\n\n   \n\nfour")
    data = text_dataset(ByteTokenizer(), data_files=[tmp_path / "t.txt"], max_seq_len=32, document_separator=r"\n\n")
    assert [bytes(data[i]["tokens"][1:-1].tolist()).decode() for i in range(len(data))] == ["one", "two\nthree", "four"]
    assert lists(data[0]) == ([BOS, *ids("one"), EOS], [*ids("one"), EOS, -100])


def test_text_from_a_json_column(jsonl: Callable[..., str]) -> None:
    path = jsonl([{"body": "hi", "other": 3}])
    data = text_dataset(ByteTokenizer(), source="json", data_files=path, column="body", max_seq_len=8)
    assert data[0]["tokens"].tolist() == [BOS, *ids("hi"), EOS]


def test_text_truncated_or_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcdefgh")
    options: dict[str, Any] = {"data_files": str(tmp_path / "t.txt"), "max_seq_len": 4}
    data = text_dataset(ByteTokenizer(), long_rows="truncate", **options)
    assert lists(data[0]) == ([BOS, *ids("abc")], [*ids("abc"), -100])
    with pytest.raises(ConfigError, match="row 0 of 'text' .* 10 tokens, more than max_seq_len=4"):
        text_dataset(ByteTokenizer(), long_rows="error", **options)


def test_plain_text_has_no_prompt(build: Build) -> None:
    with pytest.raises(ConfigError, match="dataset.source='text': .* use text_dataset"):
        build([("a", "b")], source="text")


# ---------------------------------------------------------------- the cache


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows each later run tokenises (beyond the probe of the first rows, which is always made)."""
    calls: list[int] = []
    original = ByteTokenizer.encode

    def encode(self: ByteTokenizer, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        calls.append(1)
        return original(self, text, add_bos, add_eos)

    monkeypatch.setattr(ByteTokenizer, "encode", encode)
    return calls


def test_cache_is_used_when_nothing_changed(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(str(i), "x") for i in range(100)]
    digest = build(rows).digest
    calls = counted(monkeypatch)
    assert build(rows).digest == digest
    assert len(calls) < 30  # the probe rows only
    assert build(rows, max_seq_len=5, long_rows="truncate").digest == digest  # lengths are no part of the cache
    assert len(calls) < 60


def test_cache_is_not_used_when_the_tokenizer_changed(build: Build) -> None:
    rows = [(str(i), "x") for i in range(20)]
    first, shifted = build(rows), build(rows, ByteTokenizer(shift=1))
    assert shifted[19]["tokens"].tolist() == [BOS, *(i + 1 for i in ids("19x")), EOS]
    assert first.digest != shifted.digest


def test_cache_is_not_used_when_the_tokenizers_code_changed(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same class, same attributes: only what it does differs."""
    rows = [(str(i), "x") for i in range(20)]
    build(rows)
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text, add_bos, add_eos: ids(text.upper()))
    assert build(rows)[19]["tokens"].tolist() == [BOS, *ids("19X"), EOS]


def test_cache_is_not_used_when_special_ids_changed(build: Build) -> None:
    tokenizer = ByteTokenizer()
    build([("a", "b")], tokenizer)
    tokenizer.eos_id = 7
    assert build([("a", "b")], tokenizer)[0]["tokens"].tolist() == [BOS, *ids("ab"), 7]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompt_template": "{prompt}!"}, "a!b"),
        ({"response_template": "={response}"}, "a=b"),
        ({"prompt_column": "a", "response_column": "q"}, "ba"),
    ],
)
def test_cache_is_not_used_when_an_option_changed(build: Build, options: dict[str, str], expected: str) -> None:
    build([("a", "b")])
    assert build([("a", "b")], **options)[0]["tokens"].tolist() == [BOS, *ids(expected), EOS]


def test_cache_is_not_used_when_only_the_mask_changed(build: Build) -> None:
    build([("aa", "b")])
    assert build([("aa", "b")], train_on_input=True).label_counts.tolist() == [4]


class Renaming(ByteTokenizer):
    """Another id for one letter, so that only rows with that letter differ."""

    def __init__(self, new: str) -> None:
        super().__init__()
        self.new = new

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        return super().encode(text.replace("z", self.new), add_bos, add_eos)


def test_cache_is_not_used_when_the_tokenizer_changed_for_late_rows_only(build: Build) -> None:
    rows = [("q", "a")] * 20 + [("q", "z")]
    build(rows, Renaming("x"))
    assert build(rows, Renaming("y"))[20]["tokens"].tolist() == [BOS, *ids("qy"), EOS]


def test_cache_is_not_used_when_a_local_file_changed(tmp_path: Path, build: Build) -> None:
    """Not even with the same path, size and time stamp."""
    build([("q", "a")] * 20 + [("q", "b")])
    path = tmp_path / "rows.jsonl"
    stat = path.stat()
    path.write_text(path.read_text().replace('"b"', '"c"'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    data = sft_dataset(
        ByteTokenizer(),
        source="json",
        data_files=str(path),
        prompt_column="q",
        response_column="a",
        max_seq_len=8,
    )
    assert data[20]["tokens"].tolist() == [BOS, *ids("qc"), EOS]


def test_cache_is_not_used_when_a_loaded_file_or_slice_changed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    found: list[str] = []
    for split, text in (("train[:20]", "one"), ("train[:20]", "two"), ("train[1:21]", None), ("train[:19]", None)):
        if text is not None:
            path.write_text("q,a\n" + "x,a\n" * 19 + f"x,{text}\nx,{text.upper()}\n")
            os.utime(path, (0, len(found)))
        data = sft_dataset(
            ByteTokenizer(),
            source="csv",
            data_files=str(path),
            split=split,
            prompt_column="q",
            response_column="a",
            max_seq_len=8,
        )
        found.append(bytes(data[len(data) - 1]["tokens"][1:-1].tolist()).decode())
    assert found == ["xone", "xtwo", "xTWO", "xa"]


def test_cache_holds_no_half_written_file(build: Build, caches: Path) -> None:
    """A row that cannot be tokenised stops the run; the corrected data is then tokenised as a whole."""
    source = hf_datasets.Dataset.from_dict({"q": ["a"] * 2000, "a": ["b"] * 1999 + [None]})
    folder = caches / "parquet"
    folder.mkdir(parents=True)
    source.to_parquet(folder / "train.parquet")
    options: dict[str, Any] = {"source": "parquet", "data_files": str(folder / "train.parquet")}
    with pytest.raises(ConfigError, match="row 1999 of 'parquet' .* column 'a' holds null; expected text"):
        build([], **options)
    assert len(build([], split="train[:1999]", **options)) == 1999
    assert not [file for file in caches.rglob("tmp*") if file.is_file()]


HASHES = """
import sys
from datasets.fingerprint import Hasher
from sentencepiece import SentencePieceProcessor
from tiktoken import Encoding
from tokenizers import Tokenizer
piece, json = sys.argv[1:]
ranks = {bytes([i]): i for i in range(256)}
for tokenizer in (
    SentencePieceProcessor(model_file=piece),
    Tokenizer.from_file(json),
    Encoding("x", pat_str=".", mergeable_ranks=ranks, special_tokens={"<b>": 256, "<e>": 257}),
    {"set": {"a", "b", "c", "d"}},
):
    print(Hasher.hash(tokenizer))
"""


def test_tokenizers_hash_alike_in_every_process(shared_data: Path, tmp_path: Path) -> None:
    """Otherwise every rank would tokenise everything. (That data and options do: test_ranks.)"""
    path = str(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate("abcdef")}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(path)
    command = [sys.executable, "-c", HASHES, str(shared_data / "stories260k" / "tok512.model"), path]
    runs = [
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and len(set(runs[0].split())) == 4


# ---------------------------------------------------------------- a real tokenizer


def test_sentencepiece_tokenizer_on_real_rows(shared_data: Path) -> None:
    tokenizer = SentencePieceBaseTokenizer(str(shared_data / "stories260k" / "tok512.model"))
    path = shared_data / "gsm8k" / "test.jsonl"
    data = sft_dataset(
        tokenizer,
        source="json",
        data_files=str(path),
        split="train[10:30]",
        prompt_column="question",
        response_column="answer",
        prompt_template="Question: {prompt}\nAnswer: ",
        max_seq_len=2048,
    )
    data.check_vocabulary(tokenizer.vocab_size)
    rows = [json.loads(line) for line in path.read_text().splitlines()][10:30]
    assert len(data) == 20
    for i, row in enumerate(rows):
        tokens, labels = lists(data[i])
        prompt = tokenizer.encode(f"Question: {row['question']}\nAnswer: ", add_bos=True, add_eos=False)
        assert tokens == prompt + tokenizer.encode(row["answer"], add_bos=False, add_eos=True)
        assert labels == [-100] * (len(prompt) - 1) + tokens[len(prompt) :] + [-100]
        assert tokenizer.decode(tokens[len(prompt) : -1]) == row["answer"]
