"""FSDP2: which parameters are gathered together, in which format, and where they are kept."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lrdint_tune.models.decoder import LlamaDecoder


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
    # With one shard there is nothing to free between forward and backward.
    reshard = reshard_after_forward and mesh.size(-1) > 1
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
