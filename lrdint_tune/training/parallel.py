"""From a model on the meta device to sharded weights in memory: precision, activation checkpointing, FSDP2, loading."""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lrdint_tune.adapters import Adapter, named_adapters
from lrdint_tune.attention import AttentionMethod
from lrdint_tune.attention.lambdas import LambdaForm
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.trainable import is_lambda

_SAVED_OPS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
    }
)


def set_precision(model: nn.Module, dtype: str) -> None:
    """Trainable parameters stay float32 (bf16 master weights swallow small updates); with ``dtype: bf16`` frozen ones
    become bf16, λ excepted."""
    if dtype == "bf16":
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and not is_lambda(name):
                parameter.data = parameter.data.to(torch.bfloat16)


def checkpoint_activations(model: LlamaDecoder, mode: str) -> None:
    """Recompute each block in the backward pass instead of keeping its activations.

    ``full`` keeps only the block's input; ``selective`` also keeps the outputs of matrix multiplications and of torch's
    fused attention kernels, which are the expensive ones to recompute (a compiled FlexAttention is recomputed). Only
    ``forward`` is replaced, so parameter names stay as they are and FSDP2's hooks stay outside.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = _keep_expensive
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, **options)


def _keep_expensive() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of a block's forward pass and of its recomputation.

    torch's own ``create_selective_checkpoint_contexts`` wants every operation of the forward pass to come again in the
    same number. With FSDP2 inside the block (the λ) that is not so: its hooks do less when the recomputation runs.
    """
    kept: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):
    """Keeps the outputs of the expensive operations, in order."""

    supports_higher_order_operators = True

    def __init__(self, kept: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _SAVED_OPS:
            # Detached: autograd is about to write its graph, which holds this store, into the tensor itself.
            self.kept[func].append(tree_map_only(Tensor, torch.detach, out))
        return out


class _Reuse(_Keep):
    """Gives them back instead of computing them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SAVED_OPS:
            return self.kept[func].popleft()
        return func(*args, **(kwargs or {}))


def shard_model(model: LlamaDecoder, mesh: DeviceMesh, dtype: str) -> None:
    """FSDP2 on every block, then on the root; with ``dtype: bf16`` compute is bf16 and gradients are reduced in
    float32."""
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if dtype == "bf16"
        else MixedPrecisionPolicy()
    )
    # A replicate dimension of 1 would only add an all-reduce with nobody.
    mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
    # With one shard there is nothing to free between forward and backward.
    reshard = mesh.size(-1) > 1
    # λ in a group of its own, never rounded: in the layer's it would be gathered in bf16, and its curve move in steps.
    for method in model.methods():
        for child in method.children():
            if isinstance(child, LambdaForm) and list(child.parameters()):
                fully_shard(child, mesh=mesh, mp_policy=MixedPrecisionPolicy(), reshard_after_forward=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


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


def materialise(model: LlamaDecoder, device: torch.device) -> None:
    """Give a sharded meta-device model memory and RoPE caches; weights and buffers are still to be loaded."""
    model.to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "rope_init"):
            with device:
                module.rope_init()


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
    if isinstance(target, DTensor):
        local = tensor.to(device=target.device, dtype=target.dtype)
        # src_data_rank=None: every rank holds the same full tensor, so each slices its own shard without communication.
        tensor = distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(tensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU, detached; a collective when it is sharded, so every rank must call it."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()
