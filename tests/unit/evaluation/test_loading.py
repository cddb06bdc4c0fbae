"""Every kind of folder becomes the model that it holds."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.loading import load_model
from lrdint_tune.export import save_adapter, save_hf_folder
from lrdint_tune.hosts.saving import CONFIG_FILE as HOST_METHOD
from lrdint_tune.models import LlamaDecoder, llama3_2
from lrdint_tune.models.decoder import is_new_tensor
from lrdint_tune.models.hf import iter_hf_folder
from tests.common.tiny_run import SIZES

TOKENS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def trained(model_folder: Path) -> LlamaDecoder:
    """A dint model whose λ is not 0, with another output projection than its base."""
    torch.manual_seed(3)
    lora = {"type": "lora", "rank": 2, "target_modules": ["down_proj"]}
    model = llama3_2(**{**SIZES, "method": "dint", "rank": 2, "adapters": [lora]})
    model.load_state_dict(dict(iter_hf_folder(model_folder, llama3_2(**SIZES).spec)), strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_new_tensor(name) or "output_proj" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def save(model: LlamaDecoder, folder: Path, base: str) -> Path:
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    new = {n: named[n].detach() for n in model.state_dict() if is_new_tensor(n) or "output_proj.weight" in n}
    save_adapter(
        folder,
        new.items(),
        model.spec,
        dtypes={name: tensor.dtype for name, tensor in new.items()},
        base_model_name_or_path=base,
        trainable=["adapter"],
    )
    return folder


def assert_same(loaded: LlamaDecoder, model: LlamaDecoder) -> None:
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_adapter_on_its_base(trained: LlamaDecoder, model_folder: Path, tmp_path: Path) -> None:
    folder = save(trained, tmp_path / "adapter", str(model_folder))
    loaded = load_model(folder)
    assert_same(loaded.model, trained)
    assert loaded.base == model_folder
    assert loaded.weights != load_model(model_folder).weights


def test_any_byte_of_the_weights_or_the_config_counts(model_folder: Path, tmp_path: Path) -> None:
    content = bytearray(2**20)
    loaded = dataclasses.replace(load_model(model_folder), folder=tmp_path, base=None)
    seen = set()
    for config in ("{}", '{"rope_theta": 1}'):
        for at in (0, 9000):  # the second is between the places that a run's own digest samples
            (tmp_path / "config.json").write_text(config)
            content[at] ^= 1
            (tmp_path / "model.safetensors").write_bytes(content)
            seen.add(loaded.weights)
    assert len(seen) == 4


def test_adapter_whose_base_has_moved(trained: LlamaDecoder, model_folder: Path, tmp_path: Path) -> None:
    folder = save(trained, tmp_path / "adapter", "some-hub/name")
    with pytest.raises(ConfigError, match="is an adapter of 'some-hub/name'.*give the pretrained folder as base_model"):
        load_model(folder)
    assert_same(load_model(folder, base_model=str(model_folder)).model, trained)


def test_folder_of_the_whole_model(trained: LlamaDecoder, model_folder: Path, tmp_path: Path) -> None:
    tensors = trained.state_dict().items()
    save_hf_folder(tmp_path / "hf", tensors, trained.spec, dtype=torch.float32, tokenizer_files_from=model_folder)
    loaded = load_model(tmp_path / "hf")
    assert_same(loaded.model, trained)
    assert_same(load_model(tmp_path).model, trained)  # a run's folder without checkpoints
    assert loaded.tokenizer.encode("ab", add_bos=False, add_eos=False)
    with pytest.raises(ConfigError, match="base_model='x': has no effect"):
        load_model(tmp_path / "hf", base_model="x")


def test_bf16_computes_and_leaves_lambda_in_float32(trained: LlamaDecoder, model_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(save(trained, tmp_path / "adapter", str(model_folder)), dtype="bf16").model
    kinds = {("lam" in name, p.dtype) for name, p in loaded.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    with torch.no_grad():
        ours, exact = loaded(TOKENS), trained(TOKENS)
    assert 0 < (ours - exact).abs().mean() < 0.1 * exact.abs().mean()


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def of_a_host(folder: Path) -> None:
    empty(folder)
    (folder / "adapter").mkdir()
    (folder / "adapter" / HOST_METHOD).write_text("{}")


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def another_architecture(folder: Path) -> None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "no such folder; give a Hugging Face folder"),
        (empty, "holds no model; give a Hugging Face folder"),
        (of_a_host, r"adapter/method\.json is of finetune_transformers, whose models are not read"),
        (without_tokenizer, "no tokenizer.json there"),
        (another_architecture, "not a Llama"),
    ],
)
def test_what_is_no_model(model_folder: Path, tmp_path: Path, harm: Any, message: str) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    harm(folder)
    with pytest.raises(ConfigError, match=message):
        load_model(folder)
