"""The three kinds of torchtune tokenizers: BOS once at the beginning, EOS once at the end, nothing in between."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torchtune.models.llama3 import Llama3Tokenizer
from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer, SentencePieceBaseTokenizer

from lrdint_tune.training.data import TokenisedDataset
from lrdint_tune.training.data.encode import Encoder

Build = Callable[..., TokenisedDataset]


def hugging_face(folder: Path, template: str) -> HuggingFaceBaseTokenizer:
    """``template`` is what tokenizer.json adds by itself, such as ``<s> $A``."""
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate("abcdef")}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 6), ("</s>", 7)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return HuggingFaceBaseTokenizer(
        str(folder / "tokenizer.json"), tokenizer_config_json_path=str(folder / "tokenizer_config.json")
    )


@pytest.mark.parametrize(("template", "bos"), [("$A", []), ("<s> $A", [6]), ("<s> $A </s>", [6]), ("$A </s>", [])])
def test_hugging_face(tmp_path: Path, build: Build, template: str, bos: list[int]) -> None:
    """By default BOS as tokenizer.json says; asked for, exactly one; and none at the seam."""
    tokenizer = hugging_face(tmp_path, template)
    rows = [("ab", "cd")]
    data = build(rows, tokenizer)
    assert data[0]["tokens"].tolist() == [*bos, 0, 1, 2, 3, 7]
    assert data[0]["labels"].tolist() == [-100] * (len(bos) + 1) + [2, 3, 7, -100]
    assert build(rows, tokenizer, add_bos=True)[0]["tokens"].tolist() == [6, 0, 1, 2, 3, 7]
    assert build(rows, tokenizer, add_bos=False, add_eos=False)[0]["tokens"].tolist() == [0, 1, 2, 3]


def test_tiktoken(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    tokenizer = Llama3Tokenizer(str(path))
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    data = build([("ab", "cd")], tokenizer)
    assert data[0]["tokens"].tolist() == [begin, *b"abcd", end]
    assert data[0]["tokens"].tolist() == tokenizer.encode("abcd", add_bos=True, add_eos=True)


def test_sentencepiece(shared_data: Path) -> None:
    tokenizer = SentencePieceBaseTokenizer(str(shared_data / "stories260k" / "tok512.model"))
    encoder = Encoder(tokenizer, add_bos=None, add_eos=True)
    assert (encoder.prefix, encoder.suffix, encoder.forced_bos, encoder.forced_eos) == ([1], [2], False, False)
    assert encoder.piece("Once upon") == tokenizer.encode("Once upon", add_bos=False, add_eos=False)
