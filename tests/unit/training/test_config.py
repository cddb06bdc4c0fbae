"""A config is refused before anything is built, with one line that names key, value and fix."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.components import accumulation_steps, build, build_model, build_tokenizer
from lrdint_tune.training.config import TrainConfig, load_config
from lrdint_tune.training.world import mesh_shape

MODEL = {
    "_component_": "lrdint_tune.models.llama3_2",
    "vocab_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "embed_dim": 16,
    "max_seq_len": 64,
    "intermediate_dim": 32,
    "scale_factor": 1,
}


def config(**changes: Any) -> dict[str, Any]:
    base = {
        "output_dir": "out",
        "tokenizer": {"_component_": "tok"},
        "model": dict(MODEL, method="dint", rank=2),
        "checkpointer": {"checkpoint_dir": "base"},
        "dataset": {"_component_": "data"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "max_seq_len": 64,
    }
    return base | changes


def load(**changes: Any) -> TrainConfig:
    return load_config(OmegaConf.create(config(**changes)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "fp16"}, ["dtype", "fp16", "bf16", "fp32"]),
        ({"device": "tpu"}, ["device", "tpu", "cuda"]),
        ({"batchsize": 3}, ["batchsize", "batch_size"]),
        ({"batch_size": 0}, ["batch_size=0", "at least 1"]),
        ({"epochs": "three"}, ["epochs", "three", "int"]),
        ({"clip_grad_norm": "small"}, ["clip_grad_norm", "small", "float"]),
        ({"clip_grad_norm": -1.0}, ["clip_grad_norm", "positive"]),
        ({"clip_grad_norm": float("nan")}, ["clip_grad_norm=nan", "positive"]),
        ({"output_dir": "???"}, ["output_dir=???", "give it"]),
        ({"on_nonfinite": "skip"}, ["on_nonfinite='skip'", "stop, skip_step"]),
        ({"max_skipped_steps": 3}, ["max_skipped_steps=3", "on_nonfinite=skip_step"]),
        ({"on_nonfinite": "skip_step", "max_skipped_steps": 0}, ["max_skipped_steps=0", "at least 1"]),
        ({"on_nonfinite": "skip_step", "optimizer_in_bwd": True}, ["on_nonfinite='skip_step'", "optimizer_in_bwd"]),
        ({"train_timeout_seconds": 1}, ["train_timeout_seconds=1", "at least 3"]),
        ({"train_timeout_seconds": 1800.0}, ["train_timeout_seconds=1800", "less than 1800"]),
        ({"train_timeout_seconds": None}, ["train_timeout_seconds", "float"]),
        ({"trainable": ["adapters"]}, ["trainable", "adapters", "adapter", "attention"]),
        ({"trainable": []}, ["trainable", "nothing to train"]),
        (
            {"gradient_accumulation_steps": 2, "global_batch_size": 4},
            ["global_batch_size", "gradient_accumulation_steps"],
        ),
        ({"run_val_every_n_steps": 5}, ["run_val_every_n_steps", "dataset_val"]),
        ({"checkpointer": {}}, ["checkpointer", "checkpoint_dir"]),
        ({"checkpointer": {"checkpoint_dir": "x", "checkpoint_dirs": 1}}, ["checkpoint_dirs", "checkpoint_dir"]),
        ({"optimizer": {"lr": 1.0}}, ["optimizer", "_component_"]),
        ({"data_parallel_shard_dim": 0}, ["data_parallel_shard_dim=0", "-1"]),
        ({"output_dir": "${missing}"}, ["missing"]),
        ({"peak_tflops": 0}, ["peak_tflops=0", "positive"]),
        ({"fsdp_reshard_after_forward": "yes"}, ["fsdp_reshard_after_forward='yes'", "bool"]),
        (
            {"enable_activation_offloading": True},
            ["enable_activation_offloading=true", "set enable_activation_checkpointing=true"],
        ),
        (
            {"optimizer_in_bwd": True, "clip_grad_norm": 1.0},
            ["optimizer_in_bwd=true", "clip_grad_norm=1.0", "set one of them"],
        ),
        ({"profiler": {"active": 3}}, ["profiler", "active=3", "active_steps"]),
        ({"profiler": {"active_steps": 0}}, ["profiler.active_steps=0", "at least 1"]),
        ({"profiler": {"wait_steps": -1}}, ["profiler.wait_steps=-1", "or 0"]),
        ({"profiler": {"enabled": "yes"}}, ["profiler.enabled='yes'", "true or false"]),
        ({"profiler": {"cuda": 1}}, ["profiler.cuda=1", "true or false"]),
        ({"profiler": {"output_dir": 3}}, ["profiler.output_dir=3", "path"]),
        ({"profiler": {"cpu": False, "cuda": False}}, ["profiler.cpu=false", "nothing is recorded"]),
        ({"ac_mode": "some"}, ["ac_mode", "some", "full, every_k, selective"]),
        ({"ac_mode": "every_k"}, ["ac_option", "missing", "every_k"]),
        ({"ac_mode": "every_k", "ac_option": 0}, ["ac_option=0", "at least 1"]),
        ({"ac_mode": "selective", "ac_option": 2}, ["ac_option=2", "selective", "no effect"]),
        ({"compile": "yes"}, ["compile", "yes", "bool"]),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(**changes)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_key_is_named() -> None:
    raw = config()
    del raw["dataset"]
    with pytest.raises(ConfigError, match="dataset: missing"):
        load_config(OmegaConf.create(raw))


def test_good_config_keeps_its_values() -> None:
    cfg = load(lam_lr=1, trainable="all", epochs=2)
    assert (cfg.lam_lr, cfg.trainable, cfg.epochs, cfg.dtype) == (1.0, ["all"], 2, "bf16")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "dnit"}, ["method", "dnit", "none, diff, dint"]),
        ({"rank": 0}, ["rank=0", "at least 1"]),
        ({"ranks": 2}, ["ranks=2", "rank"]),
        ({"integral": "sequence"}, ["integral", "allow_future_leak"]),
        ({"vocab": 3}, ["vocab=3"]),
    ],
)
def test_bad_model_options_are_named(options: dict[str, Any], words: list[str]) -> None:
    cfg = load(model=dict(MODEL, method="dint", rank=2) | options)
    with pytest.raises(ConfigError) as error:
        build_model(cfg, total_steps=10)
    for word in words:
        assert word in str(error.value)


def test_anneal_steps_default_to_half_of_the_run() -> None:
    model = build_model(load(model=dict(MODEL, method="dint", lam="annealed")), total_steps=10)
    assert model.spec.method_options["anneal_steps"] == 5
    model = build_model(load(model=dict(MODEL, method="dint", lam="annealed", anneal_steps=3)), total_steps=10)
    assert model.spec.method_options["anneal_steps"] == 3


def test_sequence_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_seq_len=65.*64"):
        build_model(load(max_seq_len=65), total_steps=1)


def test_unknown_component_and_option() -> None:
    with pytest.raises(ConfigError, match="optimizer._component_='torch.optim.Adamm'"):
        build("optimizer", {"_component_": "torch.optim.Adamm"})
    with pytest.raises(ConfigError, match="optimizer: torch.optim.AdamW.*learning_rate"):
        build("optimizer", {"_component_": "torch.optim.AdamW", "learning_rate": 1}, [])


def test_missing_tokenizer_file() -> None:
    section = {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "no/tokenizer.model"}
    with pytest.raises(ConfigError, match="tokenizer.path='no/tokenizer.model': no such file"):
        build_tokenizer(section)


def test_mesh_arithmetic() -> None:
    assert mesh_shape(8, 2, -1) == (2, 4, 1, 1)
    assert mesh_shape(1, 1, 1) == (1, 1, 1, 1)
    assert mesh_shape(64, 2, -1, context=4, tensor=2) == (2, 4, 4, 2)
    with pytest.raises(ConfigError, match=r"context_parallel_dim x tensor_parallel_dim=3 x 2.*8 / 6"):
        mesh_shape(8, 1, -1, context=3, tensor=2)
    with pytest.raises(ConfigError, match=r"1 \(replicate\) x 2 \(shard\) x 1 \(context\) x 2 \(tensor\) = 4, but 8"):
        mesh_shape(8, 1, 2, tensor=2)
    with pytest.raises(ConfigError, match=r"data_parallel_replicate_dim=3.*8 / 3"):
        mesh_shape(8, 3, -1)
    with pytest.raises(ConfigError, match=r"2 \(replicate\) x 3 \(shard\) = 6, but 8"):
        mesh_shape(8, 2, 3)


def test_accumulation_follows_from_the_global_batch() -> None:
    assert accumulation_steps(load(batch_size=2, global_batch_size=16), 4) == 2
    assert accumulation_steps(load(batch_size=2, gradient_accumulation_steps=3), 4) == 3
    with pytest.raises(ConfigError, match="global_batch_size=10.*2 x 4 data-parallel ranks = 8"):
        accumulation_steps(load(batch_size=2, global_batch_size=10), 4)
