"""Every file in ``configs/`` trains: five steps, with model size, tokenizer, data and passes a step replaced."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lrdint_tune.export import save_hf_folder
from lrdint_tune.reproduce.stories260k import MODEL_FILE, ROPE_BASE, TOKENIZER_FILE, read_stories260k, stories260k
from tests.common.tiny_run import SIZES, read_losses, write_model
from tests.conftest import shared_data_folder
from tests.distributed.harness import run_recipe

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
FILES = [f for f in CONFIGS if "dataset" in yaml.safe_load(f.read_text())]  # the others train nothing
LLAMAS = [f for f in FILES if "lrdint_tune.models." in yaml.safe_load(f.read_text())["model"]["_component_"]]
STEPS = 5
LENGTH = 192


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sizes, folder and tokenizer of stories260K, or of a random Llama where that is not at hand."""
    folder = tmp_path_factory.mktemp("host")
    shared = shared_data_folder()
    if not (shared / MODEL_FILE).is_file():
        write_model(folder)
        tokenizer = {
            "_component_": "torchtune.modules.transforms.tokenizers.HuggingFaceBaseTokenizer",
            "tokenizer_json_path": str(folder / "tokenizer.json"),
            "tokenizer_config_json_path": str(folder / "tokenizer_config.json"),
        }
        return {"sizes": SIZES, "folder": folder, "tokenizer": tokenizer}
    model = stories260k(shared)
    save_hf_folder(folder, model.state_dict().items(), model.spec, dtype=torch.float32)
    shutil.copy(shared / TOKENIZER_FILE, folder / "tok512.model")
    sizes, _ = read_stories260k(shared / MODEL_FILE)
    return {
        "sizes": {**sizes, "rope_base": ROPE_BASE, "norm_eps": 1e-5, "scale_factor": 1},
        "folder": folder,
        "tokenizer": {
            "_component_": "torchtune.models.llama2.llama2_tokenizer",
            "path": str(folder / "tok512.model"),
        },
    }


def write_rows(file: Path, section: dict[str, Any], count: int) -> None:
    """Rows with the columns that the section reads."""
    lines = []
    for i in range(count):
        question, answer = f"What is {i} plus {i + 1}?", f"It is {2 * i + 1}, as one may count."
        if section["_component_"].endswith("chat_dataset"):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.append({section["conversation_column"]: turns})
        else:
            lines.append({section["prompt_column"]: question, section["response_column"]: answer})
    file.write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.slow
@pytest.mark.parametrize("file", LLAMAS, ids=lambda file: file.stem)
def test_five_steps(file: Path, host: dict[str, Any], tmp_path: Path) -> None:
    config = yaml.safe_load(file.read_text())
    config["model"] = {**config["model"], **host["sizes"], "_component_": "lrdint_tune.models.llama3_2"}
    for adapter in config["model"].get("adapters", []):
        if "dims" in adapter:
            adapter["dims"] = [4, 4, 4]  # of 64 features instead of 4096
    if "lm_head" in config["trainable"]:
        config["untie_lm_head"] = True  # of this host, whose head is the embedding matrix
    config["tokenizer"] = host["tokenizer"]
    config["checkpointer"] = {"checkpoint_dir": str(host["folder"])}
    for key in ("dataset", "dataset_val"):
        rows = tmp_path / f"{key}.jsonl"
        write_rows(rows, config[key], 1200 if key == "dataset" else 16)
        config[key] = {
            **{k: v for k, v in config[key].items() if k not in ("num_rows", "split")},
            "source": "json",
            "data_files": str(rows),
            "cache_dir": str(tmp_path / "cache"),
            "long_rows": "truncate",
        }
    config |= {"output_dir": str(tmp_path / "out"), "max_seq_len": LENGTH, "epochs": 1, "max_steps_per_epoch": STEPS}
    config |= {"device": "cpu", "batch_size_val": 8, "tensor_parallel_dim": 1}  # on one process
    if "global_batch_size" in config:
        config["global_batch_size"] = 2 * config["batch_size"]  # two passes a step
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(config))
    outcome = run_recipe(written, timeout=240)
    assert outcome.codes == [0], outcome.outputs
    losses = read_losses(tmp_path / "out")
    assert set(losses) == set(range(1, STEPS + 1))
    assert all(0 < loss < 20 for loss in losses.values())
