"""Tensor parallelism: the heads and the MLP of every layer shared by several processes.

Parameters become DTensors, which FSDP2, checkpoints and export understand; a module sees its plain local part while it
runs. Everything between ``enter`` and ``leave`` (see ``TensorShard``) is computed on part of the heads or of the MLP's
width, so a layer costs two all-reduces of the hidden states forward and two backward whatever its method. Gradients of
what all heads share travel once a step more. The output head and the embeddings are whole on every process; for the
loss each takes some of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from lrdint_tune.adapters import LoRA, attached, named_adapters
from lrdint_tune.attention import AttentionMethod
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.models.tensor_shard import TensorShard

# The dimension of a weight [out, in] that is split.
_OUT, _IN = 0, 1
_SPLIT = {
    "attn.q_proj": _OUT,
    "attn.k_proj": _OUT,
    "attn.v_proj": _OUT,
    "attn.output_proj": _IN,
    "mlp.w1": _OUT,
    "mlp.w3": _OUT,
    "mlp.w2": _IN,
}


def check_tensor_parallel(model: LlamaDecoder, size: int) -> None:
    """That ``size`` processes can share each layer.

    Raises:
        ConfigError: the heads or the MLP do not divide, or the method or an adapter cannot be split.
    """
    if size == 1:
        return
    spec, key = model.spec, f"tensor_parallel_dim={size}"
    for name in ("num_heads", "num_kv_heads", "intermediate_dim"):
        if getattr(spec, name) % size:
            raise ConfigError(f"{key}: does not divide the model's {name} of {getattr(spec, name)}; lower it")
    for method in model.methods():
        refusal = method.tensor_parallel_refusal(size)
        if refusal is not None:
            raise ConfigError(f"{key}: method {spec.method!r}, {refusal}")
        known = _head_dims(method)
        for name, _ in method.named_parameters():
            if name not in known:
                raise ConfigError(
                    f"{key}: method {spec.method!r} does not say which dimension of {name} counts heads; add it to its "
                    "head_dims"
                )
    for name, adapter in named_adapters(model):
        if not isinstance(adapter, LoRA):
            raise ConfigError(f"{key}: {name} cannot be split over processes; of the adapters only lora can")


def apply_tensor_parallel(model: LlamaDecoder, mesh: DeviceMesh) -> None:
    """Share the layers of ``model`` over the one-dimensional ``mesh``; checked before."""
    shard = TensorShard(mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name)
    model.tensor_shard = shard
    plan = dict(_plan(model))
    for name, module in list(model.named_modules(remove_duplicate=True)):
        own = {key: p for key, p in module._parameters.items() if p is not None}
        for key, parameter in own.items():
            path = f"{name}.{key}"
            _distribute(module, key, parameter, mesh, plan.get(path, Replicate()))
        if own:
            # A tensor that all heads share is used in part by each process inside a shared part of the layer.
            inside = {key: f"{name}.{key}" in plan for key in own}
            _show_local_parts(module, inside)
    for layer in model.layers:
        attn, mlp = cast(Any, layer).attn, cast(Any, layer).mlp
        attn.num_heads //= shard.size
        attn.num_kv_heads //= shard.size
        for module in (attn, mlp):
            module.register_forward_pre_hook(_enter(shard))
        for module in (attn.output_proj, mlp.w2):
            # After the adapters' hook, which adds to what is summed up.
            module.register_forward_hook(lambda _, args, out: shard.leave(out))


def _enter(shard: TensorShard) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        entered = shard.enter(args[0])
        return tuple(entered if arg is args[0] else arg for arg in args)  # self-attention is given x twice

    return hook


def shared_in_part(model: LlamaDecoder) -> list[nn.Parameter]:
    """The trained parameters that every process holds whole and of whose gradient it finds a part: these are added up
    over the processes once a step."""
    parameters = dict(model.named_parameters())
    whole = [name for name, placement in _plan(model) if isinstance(placement, Replicate)]
    found = (*(parameters[name] for name in whole if name in parameters), model.output_weight)
    return [p for p in found if isinstance(p, nn.Parameter) and p.requires_grad]


def _plan(model: LlamaDecoder) -> Iterator[tuple[str, Placement]]:
    """The parameters inside the shared parts of the layers, and how they are placed."""
    for i, layer in enumerate(model.layers):
        for path, dim in _SPLIT.items():
            linear, prefix = layer.get_submodule(path), f"layers.{i}.{path}"
            yield f"{prefix}.weight", Shard(dim)
            for name in attached(linear):
                yield f"{prefix}.adapters.{name}.a.weight", Replicate() if dim == _OUT else Shard(_IN)
                yield f"{prefix}.adapters.{name}.b.weight", Shard(_OUT) if dim == _OUT else Replicate()
        for name, head_dim in _head_dims(model.methods()[i]).items():
            yield f"layers.{i}.attn.method.{name}", Replicate() if head_dim is None else Shard(head_dim)


def _head_dims(method: AttentionMethod) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for prefix, module in method.named_modules():
        declared = cast("Mapping[str, int | None]", getattr(module, "head_dims", {}))
        found |= {f"{prefix}.{name}".lstrip("."): dim for name, dim in declared.items()}
    return found


def _distribute(module: nn.Module, key: str, parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> None:
    whole = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
    module.register_parameter(key, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _show_local_parts(module: nn.Module, inside: dict[str, bool]) -> None:
    """While ``module`` runs, its DTensor parameters are their local parts.

    Args:
        inside: for each parameter whether it is used inside a shared part of a layer: of one that is not split the
            gradients of the processes must then be added up. Outside they are equal.
    """
    shown: list[dict[str, Tensor]] = []

    def before(module: nn.Module, args: Any) -> None:
        held = {key: cast(Tensor, module._parameters[key]) for key in inside}
        shown.append(held)
        for key, parameter in held.items():
            if isinstance(parameter, DTensor):
                (placement,) = parameter.placements
                partial = inside[key] and isinstance(placement, Replicate)
                local = parameter.to_local(grad_placements=[Partial() if partial else placement])
                module._parameters[key] = cast(nn.Parameter, local)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        module._parameters.update(cast(Any, shown.pop()))

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
