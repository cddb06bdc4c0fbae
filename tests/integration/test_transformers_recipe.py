"""``lrdint_tune/finetune_transformers``: its configs run with only model size, tokenizer and data replaced, as a user
types it; what it refuses; what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GPT2LMHeadModel, PreTrainedModel, RobertaForSequenceClassification

from lrdint_tune.errors import ConfigError
from lrdint_tune.finetune_transformers import Finetuning
from lrdint_tune.hosts import load, methods
from lrdint_tune.hosts.config import HostConfig
from lrdint_tune.training.config import load_config
from lrdint_tune.training.nonfinite import NonFiniteLossError
from tests.common.hosts import tiny
from tests.common.tiny_run import read_losses, write_tokenizer
from tests.integration.kill_ranks import REPOSITORY, environment
from tests.integration.runs import values

TUNE = str(Path(sys.executable).with_name("tune"))
RECIPE = "lrdint_tune/finetune_transformers"
CLASSES = {"gpt2_daa": GPT2LMHeadModel, "roberta_lorada_a": RobertaForSequenceClassification}
# The byte-level tokenizer's ids.
SPECIAL = {"vocab_size": 264, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def write_host(folder: Path, config: str) -> None:
    folder.mkdir()
    if config == "gpt2_daa":
        model = tiny("gpt2", torch.float32, n_positions=512, **SPECIAL)
    else:
        sizes = {"hidden_size": 36, "num_attention_heads": 6, "max_position_embeddings": 512 + 259}
        model = tiny("roberta", torch.float32, **sizes, **SPECIAL)
    model.save_pretrained(folder)
    write_tokenizer(folder)


def write_rows(file: Path, count: int) -> None:
    lines = []
    for i in range(count):
        text = f"{i} plus {i + 1} is {2 * i + 1}, as one may count. " * 10
        lines.append(json.dumps({"text": text, "sentence": f"{i} is {'even' if i % 2 else 'odd'}", "label": i % 2}))
    file.write_text("\n".join(lines))


@pytest.fixture(params=CLASSES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def replaced(folder: Path, name: str) -> dict[str, Any]:
    """The keys that a machine without the hub replaces, after writing what they name."""
    write_host(folder / "model", name)
    write_rows(folder / "train.jsonl", 400)
    write_rows(folder / "heldout.jsonl", 40)
    keys: dict[str, Any] = {
        "checkpointer.checkpoint_dir": folder / "model",
        "tokenizer.tokenizer_json_path": folder / "model" / "tokenizer.json",
        "tokenizer.generation_config_path": folder / "model" / "config.json",
        "output_dir": folder / "out",
        "epochs": 1,
        "max_steps_per_epoch": 5,
        "log_every_n_steps": 1,
    }
    for section, file in (("dataset", "train"), ("dataset_val", "heldout")):
        keys |= {
            f"{section}.source": "json",
            f"{section}.data_files": folder / f"{file}.jsonl",
            f"{section}.split": "train",
            f"{section}.cache_dir": folder / "cache",
        }
        keys |= {f"{section}.name": "null"} if name == "roberta_lorada_a" else {}
    return {key: str(value) for key, value in keys.items()}


@pytest.mark.slow
def test_five_steps(name: str, tmp_path: Path) -> None:
    given = [f"{key}={value}" for key, value in replaced(tmp_path, name).items()]
    command = [TUNE, "run", RECIPE, "--config", f"configs/{name}.yaml", *given]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    losses = read_losses(out)
    assert list(losses) == [1, 2, 3, 4, 5] and all(0 < loss < 20 for loss in losses.values())
    assert list(values(out, "validation_metrics/loss")) == [0, 5]
    assert "held-out loss: " in done.stderr and "at step 5" in done.stderr

    cls: Any = CLASSES[name]
    base = cls.from_pretrained(tmp_path / "model").eval()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = load(base, out / "adapter")
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, model.state_dict()[key])}
    ids = torch.randint(0, 256, (2, 9))
    assert not torch.equal(model(ids).logits, cls.from_pretrained(tmp_path / "model").eval()(ids).logits)
    if name == "gpt2_daa":
        assert changed and all(".attn.c_" in key for key in changed)
        assert methods(model)[0].lam.anneal_steps == 2 and methods(model)[0].lam.step.item() == 5
        assert list(values(out, "lambda_mean/layers.1")) == [1, 2, 3, 4, 5]
    else:
        assert changed and all(key.startswith("classifier.") for key in changed)
        assert list(values(out, "validation_metrics/accuracy")) == [0, 5]


def config_of(folder: Path, name: str, **changes: Any) -> HostConfig:
    """The config with its replacements, for this process; ``changes`` with ``__`` for the dot, None removes."""
    config = yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text())
    given = {key: yaml.safe_load(value) for key, value in replaced(folder, name).items()}
    given |= {"device": "cpu", "dtype": "fp32", **{key.replace("__", "."): value for key, value in changes.items()}}
    for key, value in given.items():
        *path, last = key.split(".")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
        if value is None:
            del section[last]
    return load_config(config, HostConfig)


def test_accumulation_gives_the_same_losses(name: str, tmp_path: Path) -> None:
    whole = {"batch_size": 4, "global_batch_size": None, "model__adapters": []}
    parts = {"batch_size": 2, "global_batch_size": 4, "model__adapters": []}
    losses = []
    for i, sizes in enumerate((whole, parts)):
        folder = tmp_path / str(i)
        folder.mkdir()
        # RoBERTa's own dropout is 0 in the tiny model, and the adapters' is left out.
        config = config_of(folder, name, max_seq_len=64, **sizes)
        Finetuning(config).train()
        losses.append(read_losses(folder / "out"))
    assert losses[0].keys() == losses[1].keys()
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, rel=1e-4), step


def test_controls_of_the_headers(name: str, tmp_path: Path) -> None:
    header = (REPOSITORY / "configs" / f"{name}.yaml").read_text().split("\noutput_dir:")[0]
    command = next(line for line in header.splitlines() if "~" in line).strip("# ").split()
    control: dict[str, Any] = {word[1:]: None for word in command if word.startswith("~")}
    assert "model.method=none" in command and len(control) in (2, 4)
    control |= {"model.method": "none", "trainable": ["attention"] if name == "gpt2_daa" else ["adapter", "head"]}
    run = Finetuning(config_of(tmp_path, name, max_seq_len=64, **control))
    run.train()
    assert {type(m).__name__ for m in methods(run.model)} == {"NoMethod"}


def test_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"model__lam": "sigmoid", "model__lam_init": None, "calibration_batches": 2}
    Finetuning(config_of(tmp_path, "gpt2_daa", max_seq_len=64, **options))
    assert "does not begin as the pretrained one" in caplog.text
    assert "calibration_batches has no effect" in caplog.text


def test_top_entropy(tmp_path: Path) -> None:
    options = {"model__method": "dex", "model__heads": "top_entropy", "calibration_batches": 2}
    run = Finetuning(config_of(tmp_path, "gpt2_daa", max_seq_len=64, **options))
    run.train()
    assert [m.selected.sum().item() for m in methods(run.model)] == [2, 2]


def broken(model: PreTrainedModel) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


def test_nonfinite_loss_saves_nothing(name: str, tmp_path: Path) -> None:
    run = Finetuning(config_of(tmp_path, name, max_seq_len=64))
    broken(run.model)
    with pytest.raises(NonFiniteLossError, match=r"step 1: loss nan.*rows \[.*nothing was updated"):
        run.train()
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("gpt2_daa", {"optimiser": {}}, "unknown key optimiser={}; did you mean optimizer?"),
        ("gpt2_daa", {"dtype": "fp16"}, "dtype='fp16': unknown; choose from bf16, fp32"),
        ("gpt2_daa", {"data_parallel_shard_dim": 2}, "unknown key data_parallel_shard_dim=2"),
        ("gpt2_daa", {"global_batch_size": 31}, "global_batch_size=31: not a multiple of batch_size=8"),
        ("gpt2_daa", {"trainable": ["mlp"]}, "trainable='mlp': unknown"),
        ("gpt2_daa", {"trainable": ["adapter", "head"]}, "trainable=head: the head is the embedding matrix"),
        ("gpt2_daa", {"max_seq_len": 513}, "max_seq_len=513: the model's limit is 512"),
        ("roberta_lorada_a", {"max_seq_len": 513}, "max_seq_len=513: the model's limit is 512"),
        ("gpt2_daa", {"model__method": "diff"}, "method='diff'"),
        ("gpt2_daa", {"model__rank": 8}, "rank=8: method 'daa' has no such option"),
        ("gpt2_daa", {"model__architecture": "T5"}, "model.architecture='T5': unknown"),
        ("gpt2_daa", {"model__architecture": "LlamaForCausalLM"}, "holds a 'gpt2' model; choose its class"),
        ("gpt2_daa", {"model__num_labels": 3}, "model.num_labels=3: GPT2LMHeadModel is no classifier"),
        ("gpt2_daa", {"checkpointer__checkpoint_dir": "/none"}, "checkpoint_dir='/none': no config.json there"),
        ("gpt2_daa", {"dataset__packed": "yes"}, "dataset.packed='yes'"),
        ("roberta_lorada_a", {"dataset__packed": True}, "dataset.packed=True"),
        (
            "roberta_lorada_a",
            {"dataset___component_": "lrdint_tune.training.data.text_dataset", "dataset__label_column": None}
            | {"dataset__text_column": None},
            "does not fit the model; use lrdint_tune.hosts.data.classification_dataset",
        ),
        ("roberta_lorada_a", {"model__num_labels": 1}, "label 1 is outside the model's 1 classes"),
        ("roberta_lorada_a", {"dataset__label_column": "text"}, "column 'text' holds '0 plus.*expected an integer"),
    ],
)
def test_refusals(config: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Finetuning(config_of(tmp_path, config, **changes))


def test_output_that_is_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "adapter"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="was not saved by lrdint_tune.hosts"):
        Finetuning(config_of(tmp_path, "gpt2_daa"))


@pytest.mark.parametrize("config", CLASSES)
def test_header_names_the_command(config: str) -> None:
    header = (REPOSITORY / "configs" / f"{config}.yaml").read_text().split("\noutput_dir:")[0]
    assert f"tune run {RECIPE} --config configs/{config}.yaml" in header


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    command = [TUNE, "run", RECIPE, "--config", "configs/gpt2_daa.yaml", "dtype=fp16"]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: dtype='fp16': unknown; choose from bf16, fp32"
