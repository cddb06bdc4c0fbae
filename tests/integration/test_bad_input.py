"""Bad input, through the real entry point: one line ``error: ...`` that names key, value and fix; exit code 2; nothing
is trained and nothing saved earlier is touched."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lrdint_tune.exit_codes import BAD_INPUT
from lrdint_tune.export import save_hf_folder
from lrdint_tune.models import llama3_2
from lrdint_tune.training.data import sft_dataset
from tests.common.tiny_run import SIZES, write_tokenizer
from tests.distributed.harness import run_recipe
from tests.integration.runs import tree
from tests.unit.data.byte_tokenizer import ByteTokenizer


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


def another_config(content: str | bytes) -> Callable[[Path, Path], list[str]]:
    """A config file of this content; the last ``--config`` counts."""

    def write(folder: Path, model: Path) -> list[str]:
        file = folder / "broken.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--config", str(file)]

    return write


def damaged(name: str, content: bytes = b"{oops", *given: str) -> Callable[[Path, Path], list[str]]:
    """A file of the model's folder with other content."""

    def write(folder: Path, model: Path) -> list[str]:
        (model / name).write_bytes(content)
        tokenizer = [f"tokenizer.tokenizer_json_path={model / 'tokenizer.json'}"]
        return [*given, *tokenizer, f"tokenizer.tokenizer_config_json_path={model / 'tokenizer_config.json'}"]

    return write


def data_file(name: str, content: bytes) -> Callable[[Path, Path], list[str]]:
    def write(folder: Path, model: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return [f"dataset.data_files={folder / name}"]

    return write


def conversation(folder: Path, model: Path) -> list[str]:
    good, bad = ([{"role": role, "content": "text"}] for role in ("assistant", "user"))
    dataset = [f"dataset={COMPONENTS}.chat_dataset", "~dataset.prompt_column", "~dataset.response_column"]
    return [*rows(folder, {"messages": good}, {"messages": bad}), *dataset, "~dataset.prompt_template"]


def damaged_cache(folder: Path, model: Path) -> list[str]:
    """Arrow files of an earlier start, cut off."""
    given = [*rows(folder, *[GOOD] * 200), f"dataset.cache_dir={folder / 'cache'}"]
    file = given[0].partition("=")[2]
    sft_dataset(
        ByteTokenizer(),
        source="json",
        data_files=file,
        prompt_column="question",
        response_column="answer",
        max_seq_len=512,
        cache_dir=str(folder / "cache"),
    )
    for arrow in (folder / "cache").rglob("generator-*.arrow"):
        os.truncate(arrow, 1000)
    return given


def a_file(key: str) -> Callable[[Path, Path], list[str]]:
    """A file where ``key`` wants a folder."""

    def write(folder: Path, model: Path) -> list[str]:
        (folder / "file").write_text("mine")
        return [override.format(folder / "file") for override in key.split()]

    return write


COMPONENTS = "lrdint_tune.training.data"
RECORDER = "metric_logger._component_=lrdint_tune.training.metrics.TensorBoardLogger"
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
    # The config file and the command line
    ("config that is missing", overrides("--config", "no.yaml"), ["--config no.yaml", "no such file", "give the path"]),
    ("config that is a folder", overrides("--config", "."), ["--config .", "Is a directory", "YAML file"]),
    ("config that is empty", another_config(""), ["broken.yaml", "is empty", "configs/"]),
    ("config that is a list", another_config("- output_dir: out\n"), ["broken.yaml", "holds a list", "without a dash"]),
    ("config of another format", another_config('{"a": [1}'), ["broken.yaml", "not valid YAML (line 1, column 9"]),
    ("config that is binary", another_config(b"PK\x03\x04\xff\xfe"), ["broken.yaml", "UTF-8"]),
    ("key given twice", another_config("seed: 1\nseed: 2\n"), ["line 2, column 1", "duplicate key seed"]),
    ("tab in the config", another_config("model:\n\trank: 3\n"), ["line 2, column 1", "correct the file"]),
    ("code in the config", another_config("seed: !!python/name:os.system\n"), ["line 1, column 7", "constructor"]),
    ("reference to nothing", overrides("output_dir=${{nothing}}/out"), ["nothing", "${...} references"]),
    ("value left open", overrides("seed=???"), ["seed=???", "give it"]),
    ("section without its keys", another_config("output_dir: out\n"), ["tokenizer", "missing from the config"]),
    ("flag instead of a key", overrides("--batch_size", "3"), ["--batch_size", "key=value"]),
    ("word instead of a key", overrides("resume"), ["resume: is no override", "key=value"]),
    ("override that is no YAML", overrides("trainable=[adapter"), ["trainable=[adapter: not valid YAML", "quote it"]),
    ("removing what is not there", overrides("~packed"), ["~packed", "no such key"]),
    ("section that is a word", overrides("checkpointer=model"), ["checkpointer='model'", "must be dict"]),
    ("component that does not exist", overrides("model=lrdint_tune.models.llama9"), ["llama9", "dotted path"]),
    ("option of a wrong type", overrides("dataset.source=3"), ["dataset.source=3", "must be str"]),
    ("folder that is a number", overrides("checkpointer.checkpoint_dir=3"), ["checkpoint_dir=3", "must be str"]),
    ("negative size", overrides("model.vocab_size=-1"), ["vocab_size=-1", "at least 1"]),
    ("no number", overrides("clip_grad_norm=.nan"), ["clip_grad_norm=nan", "positive number"]),
    # Files and folders
    ("damaged config.json", damaged("config.json"), ["config.json", "JSON"]),
    ("damaged tokenizer", damaged("tokenizer.json"), ["tokenizer.json", "get the files again"]),
    ("tokenizer of another kind", damaged("tokenizer.json", b"[]"), ["tokenizer.json", "get the files again"]),
    (
        "weights that are a page of HTML",
        damaged("model.safetensors", b"<html>", "resume=never"),
        ["model.safetensors", "damaged"],
    ),
    ("data that are a folder", lambda f, m: [f"dataset.data_files={f}"], ["is a directory", "give the path"]),
    ("data that are not UTF-8", data_file("rows.jsonl", b'{"question": "\xff"}'), ["line 1", "not UTF-8"]),
    ("half a compressed file", data_file("rows.jsonl.gz", gzip.compress(b"{}" * 99)[:-9]), ["gz'", "cannot be read"]),
    ("data of endless nesting", data_file("rows.jsonl", b"1\n" + b"[" * 200_000), ["row 0", "holds a int"]),
    ("conversation without an answer", conversation, ["row 1 (line 2 of", "'messages' has no turn of the assistant"]),
    ("damaged cache", damaged_cache, ["dataset.cache_dir=", "is damaged", "remove"]),
    ("cache that is a file", a_file("dataset.cache_dir={}"), ["dataset.cache_dir=", "cannot be written"]),
    ("output that is a file", a_file("output_dir={}"), ["output_dir", "cannot write to", "choose"]),
    ("curves that are a file", a_file(f"{RECORDER} metric_logger.log_dir={{}}"), ["log_dir=", "is no folder"]),
    # What survives faults
    ("unknown on_nonfinite", overrides("on_nonfinite=ignore"), ["on_nonfinite='ignore'", "stop, skip_step"]),
    ("limit without effect", overrides("max_skipped_steps=3"), ["max_skipped_steps=3", "on_nonfinite=skip_step"]),
    (
        "skipping what is already updated",
        overrides("on_nonfinite=skip_step", "optimizer_in_bwd=true", "clip_grad_norm=null"),
        ["on_nonfinite='skip_step'", "optimizer_in_bwd=true", "use on_nonfinite=stop"],
    ),
    ("unknown on_bad_row", overrides("dataset.on_bad_row=drop"), ["dataset.on_bad_row='drop'", "error, skip"]),
    (
        "file of bad rows",
        lambda f, m: [*lines(f, "{oops", "{}"), "dataset.on_bad_row=skip"],
        ["rows.jsonl", "all of its 2 rows are bad", "line 1 is not valid JSON"],
    ),
    (
        "validation file of bad rows",
        lambda f, m: [r.replace("dataset.", "dataset_val.") for r in lines(f, "{}")] + ["dataset_val.on_bad_row=skip"],
        ["dataset_val.on_bad_row='skip'", "its only row is bad", "no column 'question'"],
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
    assert outcome.lines[-1] == outcome.errors[0], "more lines after it"
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
