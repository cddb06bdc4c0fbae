"""A complete little run: random Llama in a Hugging Face folder, byte-level tokenizer, word problems, config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lrdint_tune.export import save_hf_folder
from lrdint_tune.models import LlamaDecoder, llama3_2
from lrdint_tune.quickstart.problems import generate, to_jsonl

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 512,
    "intermediate_dim": 64,
    "rope_base": 10_000,
    "scale_factor": 1,
}
# The shape of stories260K.
STORIES: dict[str, Any] = {
    **SIZES,
    "num_layers": 5,
    "num_heads": 8,
    "num_kv_heads": 4,
    "embed_dim": 64,
    "intermediate_dim": 192,
}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of the 256 bytes and three special tokens, in Hugging Face's files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<bos>", "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def write_model(folder: Path, **changes: Any) -> LlamaDecoder:
    """A random Llama (standard deviation 0.2: its attention maps are not flat) and its tokenizer, as a folder."""
    torch.manual_seed(11)
    model = llama3_2(**{**SIZES, **changes})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    save_hf_folder(folder, model.state_dict().items(), model.spec, dtype=torch.float32)
    write_tokenizer(folder)
    return model


def write_run(folder: Path, **changes: Any) -> Path:
    """Model, data and config in ``folder``; ``changes`` are config keys, ``__`` for the dot. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not model.exists():
        write_model(model)
    for split in ("train", "heldout"):
        file = folder / f"{split}.jsonl"
        if not file.exists():
            file.write_text(to_jsonl(generate(split, 120 if split == "train" else 12)))
    dataset = {
        "_component_": "lrdint_tune.training.data.sft_dataset",
        "source": "json",
        "prompt_column": "question",
        "response_column": "answer",
        "prompt_template": "Q: {prompt}\nA: ",
        "packed": True,
        "cache_dir": str(folder / "cache"),
    }
    config: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "tokenizer": {
            "_component_": "torchtune.modules.transforms.tokenizers.HuggingFaceBaseTokenizer",
            "tokenizer_json_path": str(model / "tokenizer.json"),
            "tokenizer_config_json_path": str(model / "tokenizer_config.json"),
        },
        "model": {"_component_": "lrdint_tune.models.llama3_2", **SIZES, "method": "dint", "rank": 3},
        "checkpointer": {"checkpoint_dir": str(model)},
        "trainable": ["adapter", "attention"],
        "max_seq_len": 512,
        "dataset": {**dataset, "data_files": str(folder / "train.jsonl")},
        "dataset_val": {**dataset, "data_files": str(folder / "heldout.jsonl")},
        "batch_size": 1,
        "global_batch_size": 4,
        "epochs": 2,
        "max_steps_per_epoch": 5,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1.0e-3},
        "lam_lr": 1.0e-2,
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 2,
        },
        "clip_grad_norm": 1.0,
        "device": "cpu",
        "dtype": "fp32",
        "save_every_n_steps": 3,
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    file = folder / "config.yaml"
    OmegaConf.save(OmegaConf.create(config), file)
    return file


def write_stories_run(folder: Path) -> Path:
    """A run of 40 short steps on about 260,000 parameters; returns its config's path."""
    write_model(folder / "model", **STORIES)
    sizes = {f"model__{key}": value for key, value in STORIES.items()}
    return write_run(folder, **sizes, max_steps_per_epoch=20, global_batch_size=2, dataset_val__num_rows=4)
