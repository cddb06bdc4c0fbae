"""Memory and values for a model that was built and sharded on the meta device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lrdint_tune.adapters import Adapter, named_adapters
from lrdint_tune.attention import AttentionMethod
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.models.hf import iter_hf_folder
from lrdint_tune.models.spec import ModelSpec
from lrdint_tune.training.nf4 import dequantised, fill_nf4, is_nf4


def initial_method_state(model: LlamaDecoder, seed: int) -> dict[str, Tensor]:
    """Start values of the new tensors, drawn on the CPU from ``seed`` alone: the same for every number of processes.

    Call it while the model is whole (before sharding); memory is needed for the new tensors only.
    """
    state: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new: list[tuple[str, AttentionMethod | Adapter]] = [
            (f"layers.{i}.attn.method", method) for i, method in enumerate(model.methods())
        ]
        for prefix, module in (*new, *named_adapters(model)):
            drawn = copy.deepcopy(module).to_empty(device="cpu")
            drawn.reset_parameters()
            state |= {f"{prefix}.{name}": tensor for name, tensor in drawn.state_dict().items()}
    return state


def materialise(model: LlamaDecoder, device: torch.device, *, cpu_offload: bool = False) -> None:
    """Give a sharded meta-device model memory and RoPE caches; weights and buffers are still to be loaded.

    With ``cpu_offload`` only buffers are on ``device``; FSDP2 brings the parameters there.
    """
    model.to_empty(device="cpu" if cpu_offload else device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))  # where it is already, unless the parameters are elsewhere
    for module in model.modules():
        if hasattr(module, "rope_init"):
            with device:
                module.rope_init()


def pretrained_tensors(folder: str | Path, spec: ModelSpec, *, untie_lm_head: bool) -> Iterator[tuple[str, Tensor]]:
    """(state-dict name, CPU tensor) of a pretrained folder for a model, one at a time; see
    :func:`~lrdint_tune.models.hf.iter_hf_folder`.

    Args:
        untie_lm_head: the model's head is its own copy of the file's embedding matrix.
    """
    for name, tensor in iter_hf_folder(folder, file_spec(spec, untie_lm_head=untie_lm_head)):
        yield name, tensor
        if untie_lm_head and name == "tok_embeddings.weight":
            yield "output.weight", tensor


def file_spec(spec: ModelSpec, *, untie_lm_head: bool) -> ModelSpec:
    """The model as its pretrained files know it: with ``untie_lm_head`` their head is still the embedding matrix."""
    return dataclasses.replace(spec, tie_word_embeddings=True) if untie_lm_head else spec


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], *, complete: bool = True) -> None:
    """Copy full tensors into the (sharded) model, one at a time; each rank keeps its own part, nothing is sent.

    Args:
        model: sharded or not; parameters and persistent buffers are filled.
        tensors: state-dict name -> full tensor, any dtype; converted to the parameter's.
        complete: every tensor of the model must be given.

    Raises:
        ConfigError: unknown name, wrong shape, or (``complete``) a tensor that nothing filled.
    """
    targets = model.state_dict(keep_vars=True)
    missing = set(targets)
    for name, tensor in tensors:
        if name not in targets:
            raise ConfigError(
                f"weights: tensor {name} is unknown to the model; the checkpoint is of another architecture"
            )
        copy_into(name, targets[name], tensor)
        missing.discard(name)
    if complete and missing:
        raise ConfigError(
            f"weights: tensor {min(missing)} (and {len(missing) - 1} more) not found; the checkpoint is incomplete"
        )


def copy_into(name: str, target: Tensor, tensor: Tensor) -> None:
    if target.shape != tensor.shape:
        raise ConfigError(
            f"weights: {name} has shape {list(tensor.shape)}, the model needs {list(target.shape)}; check "
            "model._component_"
        )
    if is_nf4(target):
        fill_nf4(target, tensor)
        return
    if isinstance(target, DTensor):
        local = tensor.to(device=target.device, dtype=target.dtype)
        # src_data_rank=None: every rank holds the same full tensor, so each slices its own shard without communication.
        tensor = distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(tensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU, detached, NF4 dequantised; a collective when it is sharded, so every rank must call
    it."""
    tensor = dequantised(tensor)
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()
