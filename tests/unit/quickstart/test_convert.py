"""GGUF -> Hugging Face folder: the same model, and the tokenizer it was trained with."""

import json
from pathlib import Path

import pytest
import torch
from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrdint_tune.quickstart.convert import convert_gguf


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("converted")
    convert_gguf(tiny.gguf, path)
    return path


def test_logits_equal_the_original(tiny, folder):
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(0, tiny.model.config.vocab_size, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens).logits, tiny.model(tokens).logits, rtol=0, atol=0)


def test_config_spells_rope_both_ways_and_ties_the_embeddings(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-5
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 16)


TEXTS = ["", "hello hello", " 12  12\n12", "a  5 =  12 héllo ½ 世界", "<|im_start|>user\nhello<|im_end|>"]


@pytest.mark.parametrize("text", TEXTS)
def test_torchtune_and_transformers_tokenise_alike(folder, text):
    ours = torchtune_tokenizer(folder).encode(text, add_bos=False, add_eos=False)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours == theirs(text).input_ids  # nothing added at the start or the end
    assert theirs.decode(ours) == text


def test_digits_stand_alone_whatever_the_merges_say(folder):
    """The vocabulary has "12" and "Ġ1"; the cut before every digit must keep them from being used."""
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
    assert theirs.tokenize("<|im_end|> hello") == ["<|im_end|>", "Ġhello"]


def test_token_ids(folder):
    tokenizer = torchtune_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("x", add_bos=False, add_eos=True)[-1] == 2
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 2


def torchtune_tokenizer(folder: Path) -> HuggingFaceBaseTokenizer:
    return HuggingFaceBaseTokenizer(
        str(folder / "tokenizer.json"),
        tokenizer_config_json_path=str(folder / "tokenizer_config.json"),
        generation_config_path=str(folder / "generation_config.json"),
    )
