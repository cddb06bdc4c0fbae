"""Frozen base weights in 4 bits (NF4, Dettmers et al. 2023, arXiv:2305.14314), sharded like any other parameter.

Each 64 weights of a row share a scale, and the scales of a row, stored in 8 bits, share another one. FSDP2 splits rows,
so no scale is cut, and a weight has the same values on every number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder

BLOCK = 64
_SHARDED = ("quantized_data", "quantized_scalers", "quantization_factor")


def takes_nf4(linear: nn.Linear) -> bool:
    return linear.in_features % BLOCK == 0


def check_nf4(model: LlamaDecoder, num_shards: int, *, cpu_offload: bool) -> None:
    """That the weights of the blocks' pretrained linear layers can be held as NF4.

    Args:
        num_shards: over how many ranks FSDP2 will spread the rows.
        cpu_offload: whether FSDP2 is to keep them in the CPU's memory.

    Raises:
        ConfigError: not one layer can be quantised, the shards do not divide the rows of one, or one shard is to be
            offloaded.
    """
    chosen = {name: linear for name, linear in model.base_linears().items() if takes_nf4(linear)}
    if not chosen:
        raise ConfigError(
            f"quantize_base='nf4': no linear layer has an input size that is a multiple of {BLOCK}; set "
            "quantize_base=none"
        )
    for name, linear in chosen.items():
        if linear.out_features % num_shards:
            raise ConfigError(
                f"quantize_base='nf4': {num_shards} shards do not divide the {linear.out_features} rows of {name}; set "
                "data_parallel_shard_dim to a divisor, and data_parallel_replicate_dim to the rest"
            )
    if cpu_offload and num_shards == 1:  # FSDP2 leaves them alone then, see sharding.py
        raise ConfigError(
            "fsdp_cpu_offload=true: with quantize_base='nf4' needs more than one shard; start more processes, or set "
            "one of them to false or none"
        )


def quantize_base(model: LlamaDecoder) -> None:
    """Hold the weights of the blocks' pretrained linear layers as NF4; they are dequantised for each product.

    Layers with an input size that is no multiple of 64 stay as they are.

    Args:
        model: on the meta device, with ``requires_grad`` and dtypes set; see :func:`check_nf4`.
    """
    like: dict[torch.Size, NF4Tensor] = {}  # the blocks have the same sizes, and quantising takes torchao a while
    for linear in model.base_linears().values():
        if takes_nf4(linear):
            shape = linear.weight.shape
            if shape not in like:
                like[shape] = _quantised(linear.weight.detach())
            linear.weight = nn.Parameter(torch.empty_like(like[shape]), requires_grad=False)


def nf4_parameters(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in model.parameters() if is_nf4(parameter)}


def is_nf4(tensor: Tensor) -> bool:
    """Whether it, or this rank's part of it, is held as NF4."""
    return _nf4(tensor) is not None


@torch.no_grad()
def fill_nf4(target: Tensor, tensor: Tensor) -> None:
    """Quantise the whole ``tensor`` and keep this rank's rows in ``target``, NF4 and sharded or not."""
    local = _nf4(target)
    assert local is not None
    whole = _quantised(tensor.to(device=target.device, dtype=target.dtype))
    for name in _SHARDED:
        part = getattr(whole, name)
        if isinstance(target, DTensor):
            part = distribute_tensor(part, target.device_mesh, target.placements, src_data_rank=None).to_local()
        getattr(local, name).copy_(part)
    # Of the whole weight on every rank; torchao leaves them on the meta device when a parameter is given memory.
    local.scaler_mean, local.nf4 = whole.scaler_mean, whole.nf4


@torch.no_grad()
def dequantised(tensor: Tensor) -> Tensor:
    """``tensor``, or for NF4 the weight it stands for, in the dtype of before, sharded as it is."""
    local = _nf4(tensor)
    if local is None:
        return tensor
    plain = local.get_original_weight()
    if not isinstance(tensor, DTensor):
        return plain
    return DTensor.from_local(plain, tensor.device_mesh, tensor.placements, run_check=False)


@torch.no_grad()
def rounded_to_nf4(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What a run of that compute ``dtype`` makes of a whole pretrained weight: quantised and dequantised."""
    return _quantised(weight.to(dtype)).get_original_weight()


def _nf4(tensor: Tensor) -> NF4Tensor | None:
    # Not to_local(), which gives another object: attributes are set on it.
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local if isinstance(local, NF4Tensor) else None


def _quantised(weight: Tensor) -> NF4Tensor:
    return to_nf4(weight, block_size=BLOCK, scaler_block_size=weight.shape[1] // BLOCK)
