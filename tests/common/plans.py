"""A small run to plan for: its config needs no file to exist."""

from __future__ import annotations

from typing import Any

from lrdint_tune.planning.knobs import Knobs
from lrdint_tune.training.config import TrainConfig, load_config

# Sizes at which activations, parameters and logits are all worth counting beside a kernel's scratch memory.
SMALL: dict[str, Any] = {
    "vocab_size": 2048,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "max_seq_len": 512,
    "intermediate_dim": 384,
    "rope_base": 10_000,
    "scale_factor": 1,
}


def planned_config(method: str = "dint", model: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """The config of a run of :data:`SMALL`; ``model`` are more of its keys, ``changes`` of the config's."""
    config: dict[str, Any] = {
        "output_dir": "nowhere",
        "tokenizer": {"_component_": "nowhere.tokenizer"},
        "model": {"_component_": "lrdint_tune.models.llama3_2", **SMALL, "method": method, **(model or {})},
        "checkpointer": {"checkpoint_dir": "nowhere"},
        "dataset": {"_component_": "nowhere.dataset", "packed": True},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1.0e-3},
        "trainable": ["adapter", "attention"],
        "max_seq_len": 512,
        "dtype": "fp32",
    }
    return load_config({**config, **changes})


def knobs(**changes: Any) -> Knobs:
    """Two ranks that share everything; ``changes`` are fields."""
    fields: dict[str, Any] = {
        "replicate": 1,
        "shard": 2,
        "tensor": 1,
        "context": 1,
        "batch_size": 1,
        "passes": 1,
        "checkpointing": "none",
        "every": 1,
        "reshard": True,
        "cpu_offload": False,
        "activation_offloading": False,
        "optimizer_in_bwd": False,
        "fp8": False,
        "fp8_all_gather": False,
        "nf4": False,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1.0e-3},
    }
    return Knobs(**{**fields, **changes})
