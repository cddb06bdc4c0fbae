"""FSDP2: which parameters are gathered together, and in which format."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.nf4 import nf4_parameters


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
    # torch 2.13 takes an NF4 weight, which is three tensors, only where it gathers; one shard is whole anyway.
    whole = set() if reshard else nf4_parameters(model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=whole)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=whole)
