"""What a run leaves: base + adapter folder == Hugging Face folder == the live model, bit for bit in its logits."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrdint_tune.attention import DocumentMask
from lrdint_tune.export import load_adapter
from lrdint_tune.models import LlamaDecoder, llama3_2
from lrdint_tune.models.hf import iter_hf_folder, spec_from_hf_config
from lrdint_tune.training.trainer import Trainer
from lrdint_tune.training.weights import full_tensor, load_weights
from tests.common.tiny_run import SIZES, read_losses
from tests.distributed.harness import run_recipe
from tests.integration.runs import finished_run, values

ADAPTERS = (
    "model.adapters=[{type: lora, target_modules: [q_proj, down_proj], rank: 2}, {type: bottleneck},"
    "{type: quanta, target_modules: [o_proj, up_proj], dims: [4, 4, 4]}]"
)
TOKENS = torch.arange(24).view(2, 12) % SIZES["vocab_size"]


def _keep_live_model(file: Path) -> None:
    """Save the live model's logits and tensors before it is exported."""
    original = Trainer.export

    def export(self: Trainer) -> None:
        with torch.no_grad():
            logits = self.model(TOKENS, mask=DocumentMask([[12], [12]]))
        state = {name: full_tensor(tensor) for name, tensor in self.model.state_dict().items()}
        if self.world.is_main:
            torch.save({"logits": logits, "state": state}, file)
        original(self)

    Trainer.export = export  # type: ignore[method-assign]


def run(config: Path, output: Path, *overrides: str, size: int = 1) -> dict[str, Any]:
    """Train to the end; the live model's logits and tensors."""
    output.mkdir(exist_ok=True)
    live = output / "live.pt"
    outcome = run_recipe(
        config, f"output_dir={output}", *overrides, size=size, prepare=[partial(_keep_live_model, live)]
    )
    assert outcome.codes == [0] * size, outcome.outputs
    return torch.load(live)


def from_hf(folder: Path) -> LlamaDecoder:
    model = llama3_2(**spec_from_hf_config(folder))
    load_weights(model, iter_hf_folder(folder, model.spec))
    return model


def from_adapter(base: Path, adapter: Path) -> LlamaDecoder:
    entry = json.loads((adapter / "adapter_config.json").read_text())
    sizes = spec_from_hf_config(base)
    tied = entry["base_model"]["tie_word_embeddings"]
    new = {"method": entry["method"], **entry["method_options"], "adapters": entry["adapters"]}
    model = llama3_2(**{**sizes, **new, "tie_word_embeddings": tied})
    base_spec = dataclasses.replace(model.spec, tie_word_embeddings=sizes["tie_word_embeddings"])
    load_weights(model, iter_hf_folder(base, base_spec), complete=False)
    load_weights(model, load_adapter(adapter, model.spec).items(), complete=False)
    return model


@torch.no_grad()
def logits(model: LlamaDecoder) -> Tensor:
    return model(TOKENS)


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        pytest.param([], 1, id="dint"),
        pytest.param(["model.lam=annealed", "trainable=[all]"], 2, id="annealed, everything trained, two ranks"),
        pytest.param(["untie_lm_head=true", "trainable=[adapter, lm_head]"], 1, id="untied head"),
        pytest.param(["model.method=diff", "model.factors=shared"], 1, id="diff, shared factors"),
        pytest.param([ADAPTERS, "trainable=[adapter]"], 2, id="dint, adapters"),
    ],
)
def test_adapter_and_folder_are_the_live_model(config: Path, tmp_path: Path, overrides: list[str], size: int) -> None:
    live = run(config, tmp_path, "epochs=1", *overrides, size=size)
    hf = from_hf(tmp_path / "hf")
    assert hf.state_dict().keys() == live["state"].keys()
    assert [name for name, t in hf.state_dict().items() if not torch.equal(t, live["state"][name])] == []
    torch.testing.assert_close(logits(hf), live["logits"], rtol=1e-5, atol=1e-5)
    adapted = from_adapter(config.parent / "model", tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), live["logits"], rtol=1e-5, atol=1e-5)
    assert (live["state"]["layers.0.attn.method.lam.value"] != 0).all(), "λ was not trained"


def test_bf16_run_exports_bf16_and_float32_lambda(config: Path, tmp_path: Path) -> None:
    run(config, tmp_path, "epochs=1", "dtype=bf16")
    stored = dict(iter_hf_folder(tmp_path / "hf", from_hf(tmp_path / "hf").spec))
    assert stored["layers.0.attn.method.lam.value"].dtype == torch.float32
    assert stored["layers.0.attn.q_proj.weight"].dtype == torch.bfloat16


def test_baseline_is_a_stock_llama(config: Path, tmp_path: Path) -> None:
    """`none`: no adapter folder, and transformers loads the other one without help."""
    live = run(config, tmp_path, "epochs=1", "model.method=none", "~model.rank")
    assert not (tmp_path / "adapter").exists()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(TOKENS).logits, live["logits"], rtol=1e-4, atol=1e-4)


def test_adapter_config(config: Path, finished: Path) -> None:
    entry = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert entry["peft_type"] == "LRDINT"
    assert entry["base_model_name_or_path"] == str(config.parent / "model")
    assert entry["r"] == 3
    assert entry["method"] == "dint"
    assert entry["trainable"] == ["adapter", "attention"]
    assert "model.layers.0.self_attn.q_proj" in entry["modules_to_save"]


def test_a_folder_can_be_trained_on(config: Path, finished: Path, tmp_path: Path) -> None:
    """The next run starts where the last one ended, the method's tensors included."""
    folder = finished / "hf"
    finished_run(config, f"output_dir={tmp_path}", f"checkpointer.checkpoint_dir={folder}", "epochs=1")
    first, last = (values(f, "validation_metrics/loss") for f in (tmp_path, finished))
    assert first[0] == pytest.approx(last[8], abs=1e-6)
    assert len(read_losses(tmp_path)) == 4


def test_leaking_run_trains_warns_and_exports_nothing(config: Path, tmp_path: Path) -> None:
    leak = ("model.integral=sequence", "model.allow_future_leak=true")
    outcome = run_recipe(config, f"output_dir={tmp_path}", *leak)
    assert outcome.codes == [0], outcome.outputs
    assert "future tokens reach the past" in outcome.outputs[0]
    assert "nothing exported" in outcome.outputs[0]
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {"checkpoints", "events", "logs"}
    assert len(read_losses(tmp_path)) == 8
    state = json.loads((tmp_path / "checkpoints" / "step-8" / "train_state.json").read_text())
    assert state["leaks_future"] is True
