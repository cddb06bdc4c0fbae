"""In which number formats a model is kept and computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.nf4 import BLOCK, takes_nf4
from lrdint_tune.training.trainable import is_lambda

if TYPE_CHECKING:
    from lrdint_tune.training.config import TrainConfig

FP8_RECIPES = ("none", "tensorwise", "rowwise", "rowwise_with_gw_hp")
# fp8 matrix products take sizes that are multiples of this, the summed one too.
FP8_MULTIPLE = 16
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
_LINEAR_GROUPS = ("attention", "mlp", "all")  # of `trainable`: those that train linear layers of the blocks


def check_precision_keys(cfg: TrainConfig) -> None:
    """What the precision keys say together, whatever the device. Raises ConfigError."""
    tokens = cfg.max_seq_len // cfg.context_parallel_dim
    if cfg.fp8.startswith("rowwise") and cfg.dtype == "fp32":
        raise ConfigError(
            f"fp8={cfg.fp8!r}: row-wise fp8 products come out in bf16, and dtype=fp32; set dtype=bf16 or fp8=tensorwise"
        )
    # The gradient of a weight sums over the tokens; rowwise_with_gw_hp computes it without fp8.
    if cfg.fp8 in ("tensorwise", "rowwise") and tokens % FP8_MULTIPLE:
        raise ConfigError(
            f"max_seq_len={cfg.max_seq_len}: fp8={cfg.fp8!r} needs a multiple of {FP8_MULTIPLE} tokens a rank, this "
            f"gives {tokens}; change max_seq_len"
        )
    if cfg.fp8_all_gather and cfg.fp8 != "tensorwise":
        raise ConfigError(f"fp8_all_gather=true: works with fp8=tensorwise only, and fp8={cfg.fp8!r}; set one of them")
    if cfg.fp8_all_gather and cfg.tensor_parallel_dim > 1:
        raise ConfigError(
            f"fp8_all_gather=true: does not work with tensor_parallel_dim={cfg.tensor_parallel_dim}; set one of them"
        )
    if cfg.quantize_base == "none":
        return
    if cfg.fp8 != "none":
        raise ConfigError(
            f"quantize_base={cfg.quantize_base!r}: does not work with fp8={cfg.fp8!r}, which reads weights of 16 or 32 "
            "bits; set one of them to none"
        )
    if trained := [group for group in cfg.trainable if group in _LINEAR_GROUPS]:
        raise ConfigError(
            f"quantize_base={cfg.quantize_base!r}: quantised weights are frozen, and trainable={cfg.trainable} trains "
            f"them; remove {', '.join(trained)} from trainable, or set quantize_base=none"
        )
    if cfg.tensor_parallel_dim > 1:
        raise ConfigError(
            f"quantize_base={cfg.quantize_base!r}: does not work with tensor_parallel_dim={cfg.tensor_parallel_dim}; "
            "set one of them"
        )


def check_precision_device(cfg: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError for a precision that ``device`` cannot run. A CPU emulates fp8."""
    if device.type != "cuda":
        if cfg.fp8_all_gather:
            raise ConfigError("fp8_all_gather=true: needs CUDA, and this runs on the CPU; set fp8_all_gather=false")
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if cfg.dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"dtype='bf16': {name} does not compute in bf16; set dtype=fp32")
    if cfg.fp8 != "none" and capability < FP8_CAPABILITY:
        needed, found = (".".join(map(str, version)) for version in (FP8_CAPABILITY, capability))
        raise ConfigError(
            f"fp8={cfg.fp8!r}: needs a GPU of compute capability {needed} (Ada, Hopper or later), and {name} has "
            f"{found}; set fp8=none"
        )


def convert_to_fp8(model: LlamaDecoder, recipe: str, *, all_gather: bool, emulate: bool) -> None:
    """Make the blocks' pretrained linear layers compute in fp8; weights, names and ``requires_grad`` stay.

    Layers with a size that fp8 does not take stay as they are. It comes before adapters are attached, since modules are
    replaced. (torchao 0.15 also computes the gradient of a frozen weight, which autograd then drops: a third of that
    layer's products, for nothing, unless the block is compiled.)

    Args:
        model: without adapters.
        recipe: one of torchao's, see ``FP8_RECIPES``.
        all_gather: FSDP2 gathers the weights in fp8.
        emulate: round to fp8, multiply in float32: for devices without fp8 products.

    Raises:
        ConfigError: not one layer has sizes that fp8 takes.
    """
    chosen = {name for name, linear in model.base_linears().items() if takes_fp8(linear)}
    if not chosen:
        raise ConfigError(
            f"fp8={recipe!r}: no linear layer has sizes that are multiples of {FP8_MULTIPLE} "
            f"({_sizes(model.base_linears().items())}); set fp8=none"
        )
    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(recipe), enable_fsdp_float8_all_gather=all_gather, emulate=emulate
    )
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in chosen)


def check_fp8_shards(model: LlamaDecoder, size: int) -> None:
    """That ``size`` tensor-parallel ranks get parts that fp8 takes. Raises ConfigError."""
    for name, linear in model.base_linears().items():
        uneven = linear.in_features % (size * FP8_MULTIPLE) or linear.out_features % (size * FP8_MULTIPLE)
        if takes_fp8(linear) and uneven:
            raise ConfigError(
                f"tensor_parallel_dim={size}: leaves parts of {name} {[linear.out_features, linear.in_features]} whose "
                f"size is not a multiple of {FP8_MULTIPLE}, which fp8 needs; lower it or set fp8=none"
            )


def takes_fp8(linear: nn.Linear) -> bool:
    return linear.in_features % FP8_MULTIPLE == 0 and linear.out_features % FP8_MULTIPLE == 0


def set_precision(model: nn.Module, dtype: str) -> None:
    """Trainable parameters stay float32 (bf16 master weights swallow small updates); with ``dtype: bf16`` frozen ones
    become bf16, λ excepted."""
    if dtype != "bf16":
        return
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad and not is_lambda(f"{path}.{name}"):
                # A new one: `.data` of a tensor subclass (fp8_all_gather) cannot be replaced.
                setattr(module, name, nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False))


def describe_precision(model: LlamaDecoder, cfg: TrainConfig) -> list[str]:
    """What a run's log says of fp8 and NF4: how many linear layers, and which ones are left as they are."""
    linears = model.base_linears()
    lines = []
    if cfg.fp8 != "none":
        converted = [linear for linear in linears.values() if isinstance(linear, Float8Linear)]
        emulated = ", emulated: this device has no fp8 products" if converted[0].config.emulate else ""
        lines.append(f"fp8 {cfg.fp8}: {len(converted)} linear layers{emulated}")
        skipped = [(name, linear) for name, linear in linears.items() if not takes_fp8(linear)]
        if skipped:
            lines.append(f"not in fp8, a size is not a multiple of {FP8_MULTIPLE}: {_sizes(skipped)}")
    if cfg.quantize_base == "nf4":
        skipped = [(name, linear) for name, linear in linears.items() if not takes_nf4(linear)]
        lines.append(
            f"NF4: {len(linears) - len(skipped)} linear layers; the exported hf folder will hold their dequantised "
            "weights"
        )
        if skipped:
            lines.append(f"not in NF4, the input size is not a multiple of {BLOCK}: {_sizes(skipped)}")
    return lines


def _sizes(linears: Iterable[tuple[str, nn.Linear]]) -> str:
    """Names with sizes ``[out, in]``, e.g. ``2 x attn.k_proj [16, 24]``: the blocks have the same."""
    counts: dict[str, int] = {}
    for name, linear in linears:
        kind = f"{name.split('.', 2)[2]} {[linear.out_features, linear.in_features]}"
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items())


def file_dtype(dtype: str) -> torch.dtype:
    """Of the weights that a run with the config's ``dtype`` leaves in ``hf``."""
    return torch.bfloat16 if dtype == "bf16" else torch.float32
