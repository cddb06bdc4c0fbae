"""FSDP2: which parameters are gathered together, in which format, and where they are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.nf4 import nf4_parameters


def shard_model(
    model: LlamaDecoder,
    mesh: DeviceMesh,
    dtype: str,
    *,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """FSDP2 on every block, then on the root; with ``dtype: bf16`` compute is bf16 and gradients are reduced in
    float32.

    Args:
        mesh: ``(replicate, shard, tensor)``; FSDP2 is over the first two.
        reshard_after_forward: free a block's gathered parameters between its forward and its backward pass, and gather
            them again. The root's (embeddings, last norm, head) are wanted again at once and stay.
        cpu_offload: keep each rank's parameters, gradients and optimizer state in the CPU's memory.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if dtype == "bf16"
        else MixedPrecisionPolicy()
    )
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    # A replicate dimension of 1 would only add an all-reduce with nobody.
    mesh = mesh["replicate", "shard"] if mesh.size(0) > 1 else mesh["shard"]
    shards = mesh.size(-1)
    # torch 2.13 takes an NF4 weight, which is three tensors, only where it gathers; one shard is whole anyway.
    whole = nf4_parameters(model) if shards == 1 else set()
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload, "ignored_params": whole}
    for layer in model.layers:
        # With one shard too: FSDP2 computes on a copy of the parameters.
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)
