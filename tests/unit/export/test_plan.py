"""The dry run: what cannot be saved is found before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.export import plan_export, save_hf_folder
from lrdint_tune.models import llama3_1_70b
from tests.common.folders import random_model


def test_every_tensor_of_a_70b_model_on_the_meta_device_has_a_name() -> None:
    with torch.device("meta"):
        model = llama3_1_70b(method="dint")
    plan = plan_export(model.state_dict(), model.spec)
    assert len(set(plan.values())) == len(model.state_dict()) == 80 * (9 + 5) + 3
    assert plan["layers.79.attn.method.q2.up"] == "model.layers.79.self_attn.method.q2.up"


def test_shapes_do_as_well_as_tensors() -> None:
    model = random_model("diff")
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert plan_export(shapes, model.spec) == plan_export(model.state_dict(), model.spec)


def test_tensors_that_cannot_be_saved_are_named() -> None:
    model = random_model("dint")
    state = dict(model.state_dict())
    with pytest.raises(ConfigError, match=r"layers\.0\.attn\.gate"):
        plan_export({**state, "layers.0.attn.gate": torch.ones(1)}, model.spec)
    with pytest.raises(ConfigError, match=r"norm\.scale.*\[25\]"):
        plan_export({**state, "norm.scale": (25,)}, model.spec)
    with pytest.raises(ConfigError, match=r"output\.weight"):
        plan_export({**state, "output.weight": torch.ones(40, 24)}, model.spec)
    del state["layers.1.attn.method.lam.value"]
    with pytest.raises(ConfigError, match=r"layers\.1\.attn\.method\.lam\.value"):
        plan_export(state, model.spec)
    leaking = random_model("dint", integral="sequence", allow_future_leak=True)
    with pytest.raises(ConfigError, match="integral='sequence'"):
        plan_export(leaking.state_dict(), leaking.spec)


def test_output_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    model = random_model()
    ours, empty, absent = tmp_path / "ours", tmp_path / "empty", tmp_path / "absent"
    save_hf_folder(ours, model.state_dict().items(), model.spec, dtype=torch.float32)
    empty.mkdir()
    plan_export(model.state_dict(), model.spec, output_dirs=[ours, empty, absent])
    for name, content in (
        ("notes.txt", "x"),
        ("config.json", '{"model_type": "llama"}'),
        ("adapter_config.json", "{}"),
    ):
        other = tmp_path / f"other-{name}"
        other.mkdir()
        (other / name).write_text(content)
        with pytest.raises(ConfigError, match="not saved by lrdint_tune"):
            plan_export(model.state_dict(), model.spec, output_dirs=[ours, other])
    with pytest.raises(ConfigError, match="not saved by lrdint_tune"):
        plan_export(model.state_dict(), model.spec, output_dirs=[ours / "config.json"])
