"""Bad input, through the real entry point: one line ``error: ...`` that names key, value and fix; exit code 2; nothing
is trained and nothing saved earlier is touched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lrdint_tune.exit_codes import BAD_INPUT
from lrdint_tune.export import save_hf_folder
from lrdint_tune.models import llama3_2
from tests.common.tiny_run import SIZES, write_tokenizer
from tests.distributed.harness import run_recipe
from tests.integration.runs import tree


def overrides(*values: str) -> Callable[[Path, Path], list[str]]:
    return lambda folder, model: list(values)


def no_weights(folder: Path, model: Path) -> list[str]:
    (model / "model.safetensors").unlink()
    return []


def half_a_file(folder: Path, model: Path) -> list[str]:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return ["resume=never"]


def other_shape(folder: Path, model: Path) -> list[str]:
    """The right config.json over weights of a narrower MLP."""
    narrow = llama3_2(**{**SIZES, "intermediate_dim": 48})
    config = (model / "config.json").read_text()
    save_hf_folder(model, narrow.state_dict().items(), narrow.spec, dtype=torch.float32)
    (model / "config.json").write_text(config)
    write_tokenizer(model)
    return ["resume=never"]


def lines(folder: Path, *text: str) -> list[str]:
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{line}\n" for line in text))
    return [f"dataset.data_files={file}"]


def rows(folder: Path, *records: object) -> list[str]:
    return lines(folder, *map(json.dumps, records))


GOOD = {"question": "1 + 1?", "answer": "2"}

CASES = [
    # name, preparation -> overrides, words the message must hold
    (
        "missing checkpoint folder",
        overrides("checkpointer.checkpoint_dir=nowhere"),
        ["nowhere", "no such folder", "tune download"],
    ),
    ("folder without weights", no_weights, ["model.safetensors", "tune download"]),
    ("damaged weights", half_a_file, ["model.safetensors", "damaged", "download"]),
    ("weights of another shape", other_shape, ["model.safetensors", "[32, 48]", "[32, 64]", "choose the builder"]),
    (
        "another model's folder",
        overrides("model.num_layers=3"),
        ["config.json", "num_hidden_layers=2", "num_layers=3", "choose the model builder"],
    ),
    (
        "missing tokenizer file",
        overrides("tokenizer.tokenizer_json_path=no/tokenizer.json"),
        ["tokenizer.tokenizer_json_path", "no/tokenizer.json", "no such file", "point it at"],
    ),
    ("unknown method", overrides("model.method=dnit"), ["method='dnit'", "none, diff, dint"]),
    ("unknown option", overrides("model.ranks=4"), ["ranks=4", "rank"]),
    ("unknown trainable group", overrides("trainable=[adapters]"), ["trainable='adapters'", "adapter, attention"]),
    ("rank 0", overrides("model.rank=0"), ["rank=0", "at least 1"]),
    (
        "row without the column",
        lambda f, m: rows(f, GOOD, {"question": "?", "reply": "2"}),
        ["row 1", "line 2", "'answer'", "'reply'", "correct"],
    ),
    (
        "row of a wrong type",
        lambda f, m: rows(f, GOOD, {"question": "?", "answer": 2}),
        ["row 1", "'answer'", "int", "expected text"],
    ),
    (
        "invalid JSON",
        lambda f, m: lines(f, json.dumps(GOOD), "{oops"),
        ["rows.jsonl", "line 2", "not valid JSON", "write one object per line"],
    ),
    ("empty dataset", lambda f, m: rows(f), ["rows.jsonl", "no rows"]),
    (
        "missing data file",
        overrides("dataset.data_files=no.jsonl"),
        ["dataset.data_files='no.jsonl'", "no such file", "give the path"],
    ),
    (
        "missing validation file",
        overrides("dataset_val.data_files=no.jsonl"),
        ["dataset_val.data_files='no.jsonl'", "no such file"],
    ),
    (
        "row longer than max_seq_len",
        overrides("max_seq_len=128"),
        ["row ", "max_seq_len=128", "raise max_seq_len", "truncate"],
    ),
    ("max_seq_len beyond the model", overrides("max_seq_len=1024"), ["max_seq_len=1024", "512", "lower it"]),
    (
        "mesh that does not fit",
        overrides("data_parallel_shard_dim=2"),
        ["data_parallel_shard_dim=2", "1 processes", "-1"],
    ),
    (
        "replicas that do not divide",
        overrides("data_parallel_replicate_dim=2"),
        ["data_parallel_replicate_dim=2", "does not divide"],
    ),
    (
        "fp8 that only CUDA gathers",
        overrides("fp8=tensorwise", "fp8_all_gather=true"),
        ["fp8_all_gather=true", "CUDA", "fp8_all_gather=false"],
    ),
    ("NF4 of what is trained", overrides("quantize_base=nf4"), ["quantize_base='nf4'", "remove attention"]),
    ("fp16", overrides("dtype=fp16"), ["dtype='fp16'", "bf16, fp32"]),
    (
        "head of a tied model",
        overrides("trainable=[lm_head]"),
        ["trainable=lm_head", "untie_lm_head=true", "embeddings"],
    ),
    ("leaking integral", overrides("model.integral=sequence"), ["integral='sequence'", "allow_future_leak"]),
    ("unknown key", overrides("batchsize=3"), ["batchsize=3", "did you mean batch_size"]),
    ("batch that does not divide", overrides("batch_size=3"), ["global_batch_size=2", "3", "multiple"]),
    ("too few rows", overrides("dataset.num_rows=1"), ["fewer than one global batch", "lower"]),
    (
        "checkpoint that is none",
        overrides("resume=nowhere/step-3"),
        ["resume='nowhere/step-3'", "not a complete checkpoint", "auto"],
    ),
    (
        "checkpoint of another model",
        overrides("checkpointer.checkpoint_dir={other}", "model.intermediate_dim=48"),
        ["resume=", "intermediate_dim is 64 there and 48 here", "another output_dir"],
    ),
    (
        "checkpoint of another method",
        overrides("model.method=diff"),
        ["resume=", "method is 'dint' there and 'diff' here", "another output_dir"],
    ),
    ("checkpoint with another rank", overrides("model.rank=2"), ["resume=", "rank is 3 there and 2 here"]),
    ("checkpoint of other data", overrides("dataset.num_rows=100"), ["resume", "rows", "120", "100"]),
    ("CPU offloading on a CPU", overrides("fsdp_cpu_offload=true"), ["fsdp_cpu_offload=true", "CUDA", "cpu", "remove"]),
    (
        "activation offloading on a CPU",
        overrides("enable_activation_offloading=true", "enable_activation_checkpointing=true"),
        ["enable_activation_offloading=true", "CUDA", "cpu", "remove"],
    ),
    (
        "updates in a backward pass of two",
        overrides("optimizer_in_bwd=true", "clip_grad_norm=null"),
        ["optimizer_in_bwd=true", "global_batch_size=2 makes 2 passes", "set global_batch_size=1"],
    ),
    (
        "updates in a backward pass of three",
        overrides(
            "optimizer_in_bwd=true", "clip_grad_norm=null", "global_batch_size=null", "gradient_accumulation_steps=3"
        ),
        ["optimizer_in_bwd=true", "gradient_accumulation_steps=3 makes 3 passes", "set gradient_accumulation_steps=1"],
    ),
    (
        "profile of kernels on a CPU",
        overrides("profiler.enabled=true", "profiler.cuda=true"),
        ["profiler.cuda=true", "cpu"],
    ),
    (
        "profile that begins after the run",
        overrides("profiler.enabled=true", "profiler.wait_steps=6"),
        ["profiler.active_steps=2", "= 13 steps, the run after 8", "lower them"],
    ),
    (
        "checkpoint of another kind of optimizer state",
        overrides("optimizer.amsgrad=true", "epochs=3"),
        ["resume=", "max_exp_avg_sq", "another output_dir"],
    ),
    (
        "output over the pretrained model",
        lambda f, m: [f"output_dir={m.rename(f / 'hf').parent}", f"checkpointer.checkpoint_dir={f / 'hf'}"],
        ["output_dir=", "checkpointer.checkpoint_dir", "choose another"],
    ),
    (
        "output folder of something else",
        overrides("output_dir={foreign}"),
        ["foreign", "not saved by lrdint_tune", "another"],
    ),
]


@pytest.mark.parametrize(("prepare", "words"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_bad_input(
    config: Path, finished: Path, tmp_path: Path, prepare: Callable[[Path, Path], list[str]], words: list[str]
) -> None:
    output, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(finished, output)
    shutil.copytree(config.parent / "model", model)
    places = {"other": str(other_model(tmp_path)), "foreign": str(foreign_folder(tmp_path))}
    given = [value.format(**places) for value in prepare(tmp_path, model)]
    before = tree(output)

    outcome = run_recipe(config, f"checkpointer.checkpoint_dir={model}", f"output_dir={output}", *given)

    assert outcome.codes == [BAD_INPUT], outcome.outputs[0]
    assert len(outcome.errors) == 1, outcome.outputs[0]
    for word in words:
        assert word in outcome.errors[0]
    assert "Traceback" not in outcome.outputs[0]
    assert re.search(r"step: +\d+%", outcome.outputs[0]) is None, "training began"
    assert tree(output) == before


def other_model(folder: Path) -> Path:
    """A folder of a model with a narrower MLP."""
    model = llama3_2(**{**SIZES, "intermediate_dim": 48})
    save_hf_folder(folder / "other", model.state_dict().items(), model.spec, dtype=torch.float32)
    return folder / "other"


def foreign_folder(folder: Path) -> Path:
    """An output folder in whose ``hf`` somebody keeps something else."""
    (folder / "foreign" / "hf").mkdir(parents=True)
    (folder / "foreign" / "hf" / "notes.txt").write_text("mine")
    return folder / "foreign"


def test_one_line_with_two_ranks(config: Path, tmp_path: Path) -> None:
    """Every rank finds the error, the first one tells it; none is left waiting."""
    outcome = run_recipe(config, f"output_dir={tmp_path}", *rows(tmp_path, GOOD, {"question": "?"}), size=2)
    assert outcome.codes == [BAD_INPUT, BAD_INPUT]
    assert len(outcome.errors) == 1
    assert "error:" not in outcome.outputs[1]


def test_mesh_with_two_ranks(config: Path, tmp_path: Path) -> None:
    outcome = run_recipe(config, f"output_dir={tmp_path}", "data_parallel_replicate_dim=3", size=2)
    assert outcome.codes == [BAD_INPUT, BAD_INPUT]
    assert "2 / 3" in outcome.errors[0]
