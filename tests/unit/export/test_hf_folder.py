"""The exported folder: read back bit for bit, loaded by transformers when it is a Llama, refused when it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lrdint_tune.errors import ConfigError
from lrdint_tune.export import save_hf_folder
from lrdint_tune.models import llama3_2
from lrdint_tune.models.hf import check_hf_config, iter_hf_folder, spec_from_hf_config, stays_float32
from tests.common.folders import SIZES, assert_equal_states, random_model, stock_folder

METHODS: list[dict[str, Any]] = [
    {"method": "none"},
    {"method": "none", "tie_word_embeddings": False},
    {"method": "diff", "rank": None, "lam": "annealed"},
    {"method": "dint", "factors": "shared"},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("shard", [5e9, 6000], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_is_read_back_bit_for_bit(
    tmp_path: Path, options: dict[str, Any], shard: float, dtype: torch.dtype
) -> None:
    model = random_model(**options)
    state = model.state_dict()
    # Reversed: the order in which a trainer gathers its tensors is its own business.
    save_hf_folder(tmp_path / "hf", reversed(state.items()), model.spec, dtype=dtype, max_shard_bytes=shard)
    check_hf_config(tmp_path / "hf", model.spec)
    expected = {name: t if stays_float32(name) else t.to(dtype) for name, t in state.items()}
    assert_equal_states(dict(iter_hf_folder(tmp_path / "hf", model.spec)), expected)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert (len(files) == 1) == (shard == 5e9)
    assert all(file.stat().st_size < shard + 4096 for file in files)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    rebuilt = llama3_2(**spec_from_hf_config(tmp_path / "hf"))
    rebuilt.load_state_dict(expected)


@pytest.mark.parametrize("scale_factor", [1, 32])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard", [5e9, 6000], ids=["one file", "shards"])
def test_plain_llama_is_loaded_by_transformers(tmp_path: Path, scale_factor: int, tied: bool, shard: float) -> None:
    model = random_model(scale_factor=scale_factor, tie_word_embeddings=tied)
    items = model.state_dict().items()
    save_hf_folder(tmp_path / "hf", items, model.spec, dtype=torch.float32, max_shard_bytes=shard)
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert stock.dtype == torch.float32 and stock.config.tie_word_embeddings == tied
    tokens = torch.randint(SIZES["vocab_size"], (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loader", [LlamaForCausalLM, AutoModelForCausalLM])
def test_stock_loaders_refuse_a_model_with_a_method(tmp_path: Path, loader: Any) -> None:
    model = random_model("dint")
    save_hf_folder(tmp_path / "hf", model.state_dict().items(), model.spec, dtype=torch.float32)
    with pytest.raises(ValueError, match="lrdint"):
        loader.from_pretrained(tmp_path / "hf")


def test_tokenizer_files_and_special_tokens_come_from_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    stock_folder(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "bos_token_id": 7, "eos_token_id": [8, 9]}))
    (base / "tokenizer.json").write_text("{}")
    (base / "original").mkdir()
    (base / "original" / "tokenizer.model").write_bytes(b"model")
    (base / "unrelated.bin").write_bytes(b"x")
    model = random_model()
    save_hf_folder(
        tmp_path / "hf", model.state_dict().items(), model.spec, dtype=torch.float32, tokenizer_files_from=base
    )
    names = {str(p.relative_to(tmp_path / "hf")) for p in (tmp_path / "hf").rglob("*") if p.is_file()}
    copied = {"tokenizer.json", "original/tokenizer.model", "generation_config.json"}
    assert names == {"config.json", "model.safetensors"} | copied
    saved = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"], saved["dtype"]) == (7, [8, 9], "float32")


def test_safetensors_file_is_aligned_and_marked_for_torch(tmp_path: Path) -> None:
    model = random_model("dint")
    save_hf_folder(tmp_path / "hf", model.state_dict().items(), model.spec, dtype=torch.bfloat16)
    file = tmp_path / "hf" / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    for name, entry in header.items():
        assert entry["data_offsets"][0] % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0, name
    with safe_open(file, framework="pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_saving_leaves_the_model_alone_and_replaces_an_earlier_save(tmp_path: Path) -> None:
    model = random_model("dint")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for shard in (6000, 5e9):
        save_hf_folder(
            tmp_path / "hf", model.state_dict().items(), model.spec, dtype=torch.float32, max_shard_bytes=shard
        )
    assert_equal_states(model.state_dict(), before)
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}


def test_parameters_that_require_gradients_are_saved(tmp_path: Path) -> None:
    model = random_model()
    save_hf_folder(tmp_path / "hf", model.named_parameters(), model.spec, dtype=torch.float32)
    assert_equal_states(dict(iter_hf_folder(tmp_path / "hf", model.spec)), model.state_dict())


@pytest.mark.parametrize("drop", [True, False], ids=["missing", "twice"])
def test_incomplete_save_raises_and_leaves_nothing(tmp_path: Path, drop: bool) -> None:
    model = random_model()
    items = list(model.state_dict().items())
    wrong = items[:-1] if drop else [*items, items[0]]
    with pytest.raises(ValueError, match="never written" if drop else "written before"):
        save_hf_folder(tmp_path / "hf", wrong, model.spec, dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_what_must_not_be_saved_or_replaced(tmp_path: Path) -> None:
    leaking = random_model("dint", integral="sequence", allow_future_leak=True)
    with pytest.raises(ConfigError, match="integral='sequence'"):
        save_hf_folder(tmp_path / "hf", leaking.state_dict().items(), leaking.spec, dtype=torch.float32)
    model = random_model()
    stock_folder(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="not saved by lrdint_tune"):
        save_hf_folder(tmp_path / "theirs", model.state_dict().items(), model.spec, dtype=torch.float32)
    with pytest.raises(ConfigError, match="tokenizer_files_from"):
        save_hf_folder(tmp_path / "hf", [], model.spec, dtype=torch.float32, tokenizer_files_from=tmp_path / "absent")
    assert {p.name for p in tmp_path.iterdir()} == {"theirs"}
