"""Hugging Face folders into our models: names, element order, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune.modules import RotaryPositionalEmbeddings
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lrdint_tune.errors import ConfigError
from lrdint_tune.models import llama3_2, llama3_2_1b
from lrdint_tune.models.hf import (
    check_hf_config,
    hf_config,
    hf_to_tune,
    iter_hf_folder,
    spec_from_hf_config,
    state_shapes,
    to_hf,
    to_tune,
    tune_to_hf,
)
from tests.common.folders import SIZES, assert_equal_states, random_model, stock_folder, stock_llama

METHODS: list[dict[str, Any]] = [
    {"method": "none"},
    {"method": "diff", "lam": "annealed"},
    {"method": "dint", "rank": 3, "factors": "shared", "lam_sharing": "layer"},
    {"method": "dint", "rank": None},
    {"method": "dint", "lam": "fixed"},
]


# ---------------------------------------------------------------------------------------------- names and element order


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_tensor_goes_there_and_back(options: dict[str, Any], tied: bool) -> None:
    model = random_model(**options, tie_word_embeddings=tied)
    state = model.state_dict()
    assert state_shapes(model.spec) == {name: tuple(t.shape) for name, t in state.items()}
    hf_names = set()
    for name, tensor in state.items():
        hf_name, moved = to_hf(name, tensor, model.spec)
        back, original = to_tune(hf_name, moved, model.spec)
        assert (hf_name, back) == (tune_to_hf(name, model.spec), hf_to_tune(hf_name, model.spec)) == (hf_name, name)
        assert moved.shape == tensor.shape and torch.equal(original, tensor)
        hf_names.add(hf_name)
    assert len(hf_names) == len(state)


def test_base_names_are_those_of_a_stock_llama() -> None:
    spec = random_model(tie_word_embeddings=False).spec
    theirs = stock_llama(tie_word_embeddings=False).state_dict()
    assert {tune_to_hf(name, spec): shape for name, shape in state_shapes(spec).items()} == {
        name: tuple(t.shape) for name, t in theirs.items()
    }


@pytest.mark.parametrize("rank", [3, None])
def test_second_queries_and_keys_meet_the_other_rope_unchanged(rank: int | None) -> None:
    """Scores from our tensors under interleaved RoPE = scores from the exported ones under Hugging Face's RoPE."""
    spec = random_model("dint", rank=rank).spec
    n, heads, hd = 7, spec.num_heads, spec.head_dim
    x = torch.randn(1, n, spec.embed_dim, dtype=torch.float64)
    wide = {"q2": heads, "k2": spec.num_kv_heads}

    def project(name: str, convert: bool) -> Tensor:
        tail = "up" if rank else "weight"
        shape = (wide[name], rank, hd) if rank else (wide[name] * hd, spec.embed_dim)
        weight = torch.randn(
            shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(name) + wide[name])
        )
        if convert:
            hf_name, weight = to_hf(f"layers.1.attn.method.{name}.{tail}", weight, spec)
            assert hf_name == f"model.layers.1.self_attn.method.{name}.{tail}"
        if not rank:
            return (x @ weight.T).unflatten(-1, (wide[name], hd))
        return torch.einsum("bnr,hrd->bnhd", x[..., :rank], weight)

    def scores(q: Tensor, k: Tensor) -> Tensor:  # [B, H, N, hd] each
        return q @ k.repeat_interleave(heads // spec.num_kv_heads, dim=1).transpose(-1, -2)

    rope = RotaryPositionalEmbeddings(hd, max_seq_len=n, base=spec.rope_base)
    ours = scores(*(rope(project(name, convert=False)).transpose(1, 2) for name in ("q2", "k2")))
    angles = torch.arange(n)[:, None] * spec.rope_base ** (-torch.arange(0, hd, 2) / hd)
    angles = torch.cat([angles, angles], dim=-1)[None]
    q, k = (project(name, convert=True).transpose(1, 2) for name in ("q2", "k2"))
    theirs = scores(*apply_rotary_pos_emb(q, k, angles.cos(), angles.sin()))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["layers.2.attn.q_proj.weight", "layers.0.attn.method.w.weight", "layers.0.attn.lora_a.weight", "rope.cache"],
)
def test_a_tensor_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no such tensor"):
        tune_to_hf(name, random_model("none").spec)


# ---------------------------------------------------------------------------------------------- reading folders


@pytest.mark.parametrize("scale_factor", [1, 32])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_equal_the_stock_model_whose_folder_is_read(tmp_path: Path, scale_factor: int, tied: bool) -> None:
    stock = stock_folder(tmp_path, scale_factor=scale_factor, tie_word_embeddings=tied)
    model = llama3_2(**spec_from_hf_config(tmp_path))
    check_hf_config(tmp_path, model.spec)
    model.load_state_dict(dict(iter_hf_folder(tmp_path, model.spec)))
    tokens = torch.randint(SIZES["vocab_size"], (2, 33))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), stock(tokens).logits, rtol=1e-4, atol=1e-5)


def test_spec_is_recovered_from_a_stock_config(tmp_path: Path) -> None:
    stock_folder(tmp_path, scale_factor=8, rope_base=500_000)
    assert spec_from_hf_config(tmp_path) == {**SIZES, "scale_factor": 8, "rope_base": 500_000, "method": "none"}


def test_shards_a_stock_folder_and_a_method_that_starts_from_it(tmp_path: Path) -> None:
    stock_llama().save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = random_model("dint")
    check_hf_config(tmp_path, model.spec)
    state = dict(iter_hf_folder(tmp_path, model.spec))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == set(model.adapter_parameters())


def test_tensors_do_not_change_with_the_file_they_came_from(tmp_path: Path) -> None:
    stock_folder(tmp_path)
    state = dict(iter_hf_folder(tmp_path, random_model().spec))
    before = {name: tensor.clone() for name, tensor in state.items()}
    with open(tmp_path / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    assert_equal_states(state, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_file_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    stock_folder(tmp_path)
    _rewrite(tmp_path, lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    assert {t.dtype for _, t in iter_hf_folder(tmp_path, random_model().spec)} == {dtype}


def test_precomputed_frequencies_of_old_folders_are_ignored(tmp_path: Path) -> None:
    stock_folder(tmp_path)
    _rewrite(tmp_path, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    spec = random_model().spec
    assert dict(iter_hf_folder(tmp_path, spec)).keys() == state_shapes(spec).keys()


def test_tied_head_in_the_file_is_accepted_when_equal_and_refused_when_not(tmp_path: Path) -> None:
    stock_folder(tmp_path)
    spec = random_model().spec
    _rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert dict(iter_hf_folder(tmp_path, spec)).keys() == state_shapes(spec).keys()
    _rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 1})
    _refused(lambda: iter_hf_folder(tmp_path, spec), "lm_head.weight differs", "tie_word_embeddings=False")


# ---------------------------------------------------------------------------------------------- bad folders


def _missing_tensor(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return tensors


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], list[str]]] = {
    "missing": (_missing_tensor, ["no tensor 'model.layers.1.mlp.up_proj.weight'"]),
    "unexpected": (
        lambda t: {**t, "model.layers.2.mlp.up_proj.weight": torch.ones(1)},
        ["unexpected tensor 'model.layers.2.mlp.up_proj.weight'", "model.safetensors"],
    ),
    "method": (
        lambda t: {**t, "model.layers.0.self_attn.method.q2.up": torch.ones(4, 8, 8)},
        ["unexpected tensor 'model.layers.0.self_attn.method.q2.up'", "method='none'"],
    ),
    "shape": (
        lambda t: {**t, "model.norm.weight": torch.ones(25)},
        ["model.norm.weight has shape [25] but the model expects [24]", "model.safetensors"],
    ),
    "quantised": (
        lambda t: {**t, "model.norm.weight": torch.ones(24, dtype=torch.int8)},
        ["model.norm.weight is of type I8"],
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_wrong_tensors_are_named_before_any_is_read(tmp_path: Path, case: str) -> None:
    stock_folder(tmp_path)
    change, expected = BAD_TENSORS[case]
    _rewrite(tmp_path, change)
    _refused(lambda: iter_hf_folder(tmp_path, random_model().spec), *expected)


def test_part_of_a_method_is_refused(tmp_path: Path) -> None:
    stock_folder(tmp_path)
    _rewrite(tmp_path, lambda t: {**t, "model.layers.0.self_attn.method.lam.value": torch.ones(4)})
    _refused(lambda: iter_hf_folder(tmp_path, random_model("dint").spec), "self_attn.method.")


def test_untied_model_needs_a_head(tmp_path: Path) -> None:
    stock_folder(tmp_path)
    _refused(
        lambda: iter_hf_folder(tmp_path, random_model(tie_word_embeddings=False).spec), "no tensor 'lm_head.weight'"
    )


def test_missing_folders_and_files(tmp_path: Path) -> None:
    spec = random_model().spec
    absent = tmp_path / "absent"
    for attempt in (lambda: iter_hf_folder(absent, spec), lambda: check_hf_config(absent, spec)):
        _refused(attempt, "no such folder", f"`tune download <repo> --output-dir {absent}`")
    for attempt in (lambda: iter_hf_folder(tmp_path, spec), lambda: check_hf_config(tmp_path, spec)):
        _refused(attempt, "tune download")
    stock_llama().save_pretrained(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    _refused(lambda: iter_hf_folder(tmp_path, spec), f"lists '{shard.name}'", "tune download")
    shard.write_bytes(content[: len(content) // 2])
    _refused(lambda: iter_hf_folder(tmp_path, spec), str(shard), "damaged or incomplete")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    _refused(lambda: iter_hf_folder(tmp_path, spec), "model.safetensors.index.json", "not valid JSON")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "width": ({"hidden_size": 32}, ["hidden_size=32", "embed_dim=24"]),
    "kv_heads": ({"num_key_value_heads": 4}, ["num_key_value_heads=4", "num_kv_heads=2"]),
    "eps": ({"rms_norm_eps": 1e-6}, ["rms_norm_eps=1e-06", "norm_eps=1e-05"]),
    "rope base": ({"rope_parameters": None, "rope_theta": 5e5}, ["rope_theta=500000", "rope_base=10000"]),
    "rope disagrees": ({"rope_theta": 5e5}, ["rope_theta=10000.0 in rope_parameters", "500000.0 in rope_theta"]),
    "rope scaled": (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        ["RoPE scaling factor=8", "scale_factor=1"],
    ),
    "rope kind": ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, ["linear", "llama3"]),
    "tied": ({"tie_word_embeddings": False}, ["tie_word_embeddings=False", "tie_word_embeddings=True"]),
    "architecture": ({"model_type": "gpt2"}, ["model_type='gpt2'"]),
    "bias": ({"attention_bias": True}, ["attention_bias=True"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_that_disagrees_is_refused_with_both_values(tmp_path: Path, case: str) -> None:
    stock_folder(tmp_path)
    change, expected = BAD_CONFIGS[case]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    _refused(lambda: check_hf_config(tmp_path, random_model().spec), "config.json", *expected)


def test_config_without_a_size_or_of_no_json_is_refused(tmp_path: Path) -> None:
    spec = random_model().spec
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    _refused(lambda: check_hf_config(tmp_path, spec), "config.json", "no vocab_size")
    (tmp_path / "config.json").write_text("hidden_size: 3")
    _refused(lambda: check_hf_config(tmp_path, spec), "config.json", "not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    _refused(lambda: check_hf_config(tmp_path, spec), "config.json", "not a JSON object")


# ---------------------------------------------------------------------------------------------- config.json


def test_published_llama_3_2_config_fits_the_builder(tmp_path: Path) -> None:
    """The config.json of Llama-3.2-1B as published (transformers 4 spelling)."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        spec = llama3_2_1b(method="dint").spec
    check_hf_config(tmp_path, spec)
    ours = hf_config(replace(spec, method="none", method_options={}))
    for key, value in config.items():
        assert ours[key] == value or key in ("bos_token_id", "eos_token_id"), key


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_config_round_trip(tmp_path: Path, options: dict[str, Any]) -> None:
    spec = random_model(**options, scale_factor=32).spec
    (tmp_path / "config.json").write_text(json.dumps(hf_config(spec)))
    check_hf_config(tmp_path, spec)
    with torch.device("meta"):
        rebuilt = llama3_2(**spec_from_hf_config(tmp_path))
    check_hf_config(tmp_path, rebuilt.spec)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"method": "diff"}, ["method='dint'", "method='diff'"]),
        ({"method": "none"}, ["method='dint'", "method='none'"]),
        ({"method": "dint", "secondary_scale": "variance"}, ["secondary_scale='seed'", "secondary_scale='variance'"]),
    ],
)
def test_config_of_another_method_is_refused(tmp_path: Path, other: dict[str, Any], expected: list[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(random_model("dint").spec)))
    _refused(lambda: check_hf_config(tmp_path, random_model(**other).spec), "config.json", *expected)


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def _refused(attempt: Callable[[], object], *expected: str) -> None:
    """The error is one line and says all of ``expected``."""
    with pytest.raises(ConfigError) as caught:
        attempt()
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message
