"""Formats of parameters and of products on one process; sharded ones are tested in tests/distributed."""

from typing import Any

import pytest
import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchao.float8.float8_linear import Float8Linear

from lrdint_tune.adapters import TARGETS
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import is_new_tensor
from lrdint_tune.training.components import build_model
from lrdint_tune.training.config import TrainConfig, load_config
from lrdint_tune.training.nf4 import check_nf4, dequantised, is_nf4, quantize_base
from lrdint_tune.training.precision import check_precision_device, convert_to_fp8, describe_precision, set_precision
from lrdint_tune.training.trainable import set_trainable
from lrdint_tune.training.weights import full_tensor, load_weights, materialise
from tests.common.adapters import wake_adapters
from tests.common.tiny_run import SIZES, tiny_dint

LORA = [{"type": "lora", "target_modules": ["q_proj", "o_proj", "down_proj"], "rank": 16}]
BASE_LINEARS = {f"layers.{i}.{path}" for i in range(2) for path in TARGETS.values()}
FP8 = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
TOKENS = torch.arange(32).view(2, 16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def config(**changes: Any) -> TrainConfig:
    model = {"_component_": "lrdint_tune.models.llama3_2", **SIZES, "method": "dint", "rank": 2}
    section = {"_component_": "unused"}
    return load_config(
        {
            "output_dir": "out",
            "tokenizer": section,
            "dataset": section,
            "optimizer": section,
            "checkpointer": {"checkpoint_dir": "base"},
            "max_seq_len": 512,
            "device": "cpu",
            **changes,
            "model": {**model, **changes.get("model", {})},
        }
    )


def converted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def test_only_frozen_parameters_become_bf16() -> None:
    model = tiny_dint("meta")
    set_trainable(model, ["adapter", "norms"])
    set_precision(model, "bf16")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    untouched = tiny_dint("meta")
    set_trainable(untouched, ["adapter"])
    set_precision(untouched, "fp32")
    assert all(p.dtype == torch.float32 for p in untouched.parameters())


def test_a_frozen_lambda_stays_float32() -> None:
    model = tiny_dint()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    set_precision(model, "bf16")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert all((dtype == torch.float32) == (".lam." in name) for name, dtype in dtypes.items())


# ---------------------------------------------------------------- fp8


@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("tied", [True, False])
def test_fp8_converts_every_base_linear_and_nothing_else(recipe: str, tied: bool) -> None:
    """Every size of the adapters, of the method and of the head is a multiple of 16 here too."""
    options = {"rank": 16, "adapters": LORA, "tie_word_embeddings": tied, "vocab_size": 272}
    plain = build_model(config(model=options))
    model = build_model(config(model=options, fp8=recipe))
    assert converted(model) == BASE_LINEARS
    others = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)} - BASE_LINEARS
    assert others >= {"layers.0.attn.method.q2.down", "layers.1.attn.q_proj.adapters.lora.b"}
    assert ("output" in others) == (not tied)
    assert model.spec == plain.spec
    shapes, expected = ({n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (model, plain))
    assert shapes == expected
    assert list(model.state_dict()) == list(plain.state_dict())
    (line,) = describe_precision(model, config(fp8=recipe))
    assert line == f"fp8 {recipe}: 14 linear layers, emulated: this device has no fp8 products"


def test_fp8_skips_and_lists_other_sizes() -> None:
    changes = {"model": {"intermediate_dim": 40, "adapters": LORA}, "fp8": "tensorwise"}
    model = build_model(config(**changes))
    assert converted(model) == {name for name in BASE_LINEARS if ".attn." in name}
    assert describe_precision(model, config(**changes))[1:] == [
        "not in fp8, a size is not a multiple of 16: 2 x mlp.w1 [40, 32], 2 x mlp.w3 [40, 32], 2 x mlp.w2 [32, 40]"
    ]
    with pytest.raises(ConfigError, match=r"^fp8='tensorwise': no linear layer .* set fp8=none$"):
        build_model(config(model={"embed_dim": 24, "num_heads": 4, "num_kv_heads": 4}, fp8="tensorwise"))


@pytest.mark.parametrize("recipe", FP8)
def test_fp8_rounds_both_passes_and_adapters_learn(recipe: str) -> None:
    """Output and gradients are near those without, and others; frozen weights have no gradient."""
    torch.manual_seed(1)
    plain, model = tiny_dint(lam_init=0.3, adapters=LORA), tiny_dint(lam_init=0.3)
    wake_adapters(plain)
    convert_to_fp8(model, recipe, all_gather=False, emulate=True)
    model.attach_adapters(LORA)
    model.load_state_dict(plain.state_dict())
    for m in (plain, model):
        set_trainable(m, ["adapter"])
    logits, expected = model(TOKENS), plain(TOKENS)
    assert 1e-4 < ((logits - expected).norm() / expected.norm()).item() < 0.1
    logits.square().sum().backward()
    expected.square().sum().backward()
    of_plain = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == is_new_tensor(name)
        if parameter.requires_grad:
            gradient, other = parameter.grad, of_plain[name].grad
            assert gradient is not None and other is not None and other.norm() > 0, name
            assert 1e-5 < ((gradient - other).norm() / other.norm()).item() < 0.5, name
        else:
            assert parameter.grad is None, name


# ---------------------------------------------------------------- NF4


def test_nf4_holds_the_base_linears_in_four_bits() -> None:
    torch.manual_seed(1)
    sizes = {"embed_dim": 64, "intermediate_dim": 96, "adapters": LORA}
    plain = tiny_dint(**sizes)
    model = tiny_dint("meta", **sizes)
    set_trainable(model, ["adapter"])
    set_precision(model, "bf16")
    quantize_base(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    materialise(model, CPU)
    load_weights(model, plain.state_dict().items())
    # w2 has 96 inputs.
    assert {name for name, p in model.named_parameters() if is_nf4(p)} == {
        f"{name}.weight" for name in BASE_LINEARS if not name.endswith("w2")
    }
    for name, parameter in model.named_parameters():
        if is_nf4(parameter):
            whole = dequantised(parameter)
            error = (whole - plain.get_parameter(name)).norm() / plain.get_parameter(name).norm()
            assert whole.dtype == torch.bfloat16 and 0.02 < error < 0.15, name
            assert isinstance(parameter, NF4Tensor)
            parts = (parameter.quantized_data, parameter.quantized_scalers, parameter.quantization_factor)
            assert sum(part.nbytes for part in parts) * 8 / parameter.numel() < 4.5
    assert describe_precision(model, config(quantize_base="nf4", trainable=["adapter"]))[1] == (
        "not in NF4, the input size is not a multiple of 64: 2 x mlp.w2 [64, 96]"
    )


def test_nf4_computes_with_the_dequantised_weights() -> None:
    """The plain model with these weights: the same logits and the same gradients of adapters and method."""
    torch.manual_seed(1)
    options = {"embed_dim": 64, "lam_init": 0.3, "adapters": LORA}
    plain, model = tiny_dint(**options), tiny_dint("meta", **options)
    wake_adapters(plain)
    set_trainable(model, ["adapter"])
    quantize_base(model)
    materialise(model, CPU)
    load_weights(model, plain.state_dict().items())
    load_weights(plain, ((name, full_tensor(tensor)) for name, tensor in model.state_dict().items()))
    set_trainable(plain, ["adapter"])
    logits, expected = model(TOKENS), plain(TOKENS)
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    of_plain = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_new_tensor(name), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, of_plain[name].grad)
            assert parameter.grad.any(), name


def test_nf4_refuses_what_it_cannot_shard() -> None:
    with pytest.raises(ConfigError, match=r"3 shards do not divide the 64 rows of layers.0.attn.q_proj; set data_par"):
        check_nf4(tiny_dint("meta", embed_dim=64), 3, cpu_offload=False)
    with pytest.raises(ConfigError, match=r"^quantize_base='nf4': no linear layer has an input size .* of 64; set"):
        check_nf4(tiny_dint("meta", intermediate_dim=48), 1, cpu_offload=False)
    with pytest.raises(ConfigError, match="fsdp_cpu_offload=true: with quantize_base='nf4' needs more than one shard"):
        check_nf4(tiny_dint("meta", embed_dim=64), 1, cpu_offload=True)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fp8": "mx"}, ["fp8='mx'", "none, tensorwise, rowwise, rowwise_with_gw_hp"]),
        ({"fp8": "rowwise", "dtype": "fp32"}, ["fp8='rowwise'", "dtype=fp32", "set dtype=bf16"]),
        ({"fp8": "rowwise_with_gw_hp", "dtype": "fp32"}, ["fp8='rowwise_with_gw_hp'", "fp8=tensorwise"]),
        ({"fp8": "tensorwise", "max_seq_len": 200}, ["max_seq_len=200", "multiple of 16", "200"]),
        ({"fp8": "rowwise", "max_seq_len": 48, "context_parallel_dim": 2}, ["max_seq_len=48", "gives 24"]),
        ({"fp8_all_gather": True}, ["fp8_all_gather=true", "fp8='none'"]),
        ({"fp8_all_gather": True, "fp8": "rowwise"}, ["fp8_all_gather=true", "fp8=tensorwise", "fp8='rowwise'"]),
        (
            {"fp8_all_gather": True, "fp8": "tensorwise", "tensor_parallel_dim": 2},
            ["fp8_all_gather=true", "tensor_parallel_dim=2"],
        ),
        ({"quantize_base": "int4"}, ["quantize_base='int4'", "none, nf4"]),
        ({"quantize_base": "nf4"}, ["quantize_base='nf4'", "remove attention from trainable"]),
        ({"quantize_base": "nf4", "trainable": ["adapter", "mlp"]}, ["quantize_base='nf4'", "remove mlp from"]),
        ({"quantize_base": "nf4", "trainable": ["all"]}, ["quantize_base='nf4'", "remove all from"]),
        (
            {"quantize_base": "nf4", "trainable": ["adapter"], "fp8": "rowwise"},
            ["quantize_base='nf4'", "fp8='rowwise'"],
        ),
        (
            {"quantize_base": "nf4", "trainable": ["adapter"], "tensor_parallel_dim": 2},
            ["quantize_base='nf4'", "tensor_parallel_dim=2"],
        ),
    ],
)
def test_keys_that_do_not_go_together(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        config(**changes)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_keys_that_do() -> None:
    for changes in (
        {"fp8": "tensorwise", "dtype": "fp32"},
        {"fp8": "tensorwise", "fp8_all_gather": True},
        {"fp8": "rowwise_with_gw_hp", "max_seq_len": 200},
        {"quantize_base": "nf4", "trainable": ["adapter", "norms", "embeddings"]},
    ):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "capability", "bf16", "refused"),
    [
        ({"fp8": "tensorwise"}, (8, 0), True, r"^fp8='tensorwise': .* 8.9 .* A GPU has 8.0; set fp8=none$"),
        ({"fp8": "tensorwise"}, (8, 9), True, None),
        ({"fp8": "tensorwise", "fp8_all_gather": True}, (9, 0), True, None),
        ({}, (7, 5), False, r"^dtype='bf16': A GPU does not compute in bf16; set dtype=fp32$"),
        ({"dtype": "fp32"}, (7, 5), False, None),
    ],
)
def test_what_a_gpu_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    capability: tuple[int, int],
    bf16: bool,
    refused: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    if refused is None:
        check_precision_device(config(**changes), CUDA)
    else:
        with pytest.raises(ConfigError, match=refused):
            check_precision_device(config(**changes), CUDA)


def test_what_a_cpu_cannot_run() -> None:
    check_precision_device(config(fp8="tensorwise"), CPU)
    with pytest.raises(ConfigError, match="^fp8_all_gather=true: needs CUDA"):
        check_precision_device(config(fp8="tensorwise", fp8_all_gather=True), CPU)
