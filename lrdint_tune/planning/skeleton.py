"""The model as one rank of many holds it, without memory: real modules on the meta device, sharded by the training's
own code under a process group that sends nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.planning.knobs import Knobs
from lrdint_tune.training.components import build_model
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.nf4 import BLOCK, takes_nf4
from lrdint_tune.training.parallelize import parallelize
from lrdint_tune.training.precision import takes_fp8
from lrdint_tune.training.trainable import optimizer_groups, set_trainable
from lrdint_tune.training.world import MeshShape, make_world

ROOT = "root"  # the FSDP group of what is in no block


@contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """This process as rank 0 of ``world_size``, with collectives that do nothing.

    Raises:
        ConfigError: it is one of several already.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("plan: runs in one process, without a launcher; world_size says how many ranks to plan for")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def plain(cfg: TrainConfig) -> TrainConfig:
    """The config without what changes modules but no parameter's place: the effect of that is computed."""
    return dataclasses.replace(
        cfg,
        enable_activation_checkpointing=False,
        enable_activation_offloading=False,
        ac_mode="full",
        ac_option=None,
        compile=False,
        fp8="none",
        fp8_all_gather=False,
        quantize_base="none",
        fsdp_cpu_offload=False,
    )


def local_config(cfg: TrainConfig, tensor: int, *, num_layers: int | None = None) -> TrainConfig:
    """The config of what one of ``tensor`` tensor-parallel ranks holds: heads and the MLP's width split, embeddings,
    norms and head whole. For what a block computes; where parameters lie is the training's own business.

    Args:
        num_layers: fewer blocks than the model has, to look at one of them.

    Raises:
        ConfigError: the model cannot be built.
    """
    section = dict(cfg.model)
    if tensor > 1:
        spec = build_model(cfg).spec
        section |= {
            "num_heads": spec.num_heads // tensor,
            "num_kv_heads": spec.num_kv_heads // tensor,
            "head_dim": spec.head_dim,
            "intermediate_dim": spec.intermediate_dim // tensor,
        }
        section.pop("top_k", None)  # heads to act on, of all ranks together; it changes no size
    if num_layers is not None:
        section["num_layers"] = num_layers
    return dataclasses.replace(plain(cfg), model=section)


def local_model(cfg: TrainConfig, tensor: int, *, num_layers: int | None = None) -> LlamaDecoder:
    """The model of :func:`local_config` on the meta device, with ``requires_grad`` set. Raises ConfigError."""
    model = build_model(local_config(cfg, tensor, num_layers=num_layers))
    set_trainable(model, cfg.trainable)
    return model


@dataclass(frozen=True)
class Group:
    """What FSDP gathers and reduces together, on one rank.

    Attributes:
        sharded: bytes of this rank's part, at rest.
        gathered: bytes of the whole, in the compute dtype; padded to the number of shards.
        sent: bytes of the buffer in which it is gathered; less than ``gathered`` when weights travel in fp8.
        cast: bytes of this rank's part that are converted before they are gathered.
        trained: elements of the trained tensors, padded: what a reduce-scatter takes.
        gradients: bytes of those as autograd produces them, in the compute dtype.
        largest: bytes of the largest gathered tensor.
    """

    sharded: int = 0
    gathered: int = 0
    sent: int = 0
    cast: int = 0
    trained: int = 0
    gradients: int = 0
    largest: int = 0

    def __add__(self, other: Group) -> Group:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        return Group(**{**sums, "largest": max(self.largest, other.largest)})


@dataclass(frozen=True)
class Skeleton:
    """A sharded model, as numbers.

    Attributes:
        groups: by name, :data:`ROOT` or ``layers.N``.
        parameter_groups: the optimizer's, holding this rank's parts as plain meta tensors.
        buffers: bytes of what is not a parameter, the RoPE cache above all.
    """

    groups: dict[str, Group]
    parameter_groups: list[dict]
    buffers: int


def build_skeleton(cfg: TrainConfig, knobs: Knobs) -> Skeleton:
    """Build the model, set what is trained and shard it with the training's own functions, in a :func:`fake_world`.

    Raises:
        ConfigError: as those do.
    """
    model = build_model(plain(cfg))
    set_trainable(model, cfg.trainable)
    linears = model.base_linears().items()
    in_nf4 = {f"{name}.weight" for name, linear in linears if knobs.nf4 and takes_nf4(linear)}
    in_fp8 = {f"{name}.weight" for name, linear in linears if knobs.fp8_all_gather and takes_fp8(linear)}
    shape = MeshShape(knobs.replicate, knobs.shard, knobs.context, knobs.tensor)
    parallelize(model, plain(cfg), make_world(torch.device("cpu"), shape))
    compute = 2 if cfg.dtype == "bf16" else 4
    groups: dict[str, Group] = {}
    parts: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        part = parts[id(parameter)] = nn.Parameter(parameter.to_local(), requires_grad=parameter.requires_grad)
        owner = ".".join(name.split(".")[:2]) if name.startswith("layers.") else ROOT
        groups[owner] = groups.get(owner, Group()) + _of_parameter(
            part, knobs, compute, nf4=name in in_nf4, fp8=name in in_fp8
        )
    parameter_groups = optimizer_groups(model, lam_lr=cfg.lam_lr)
    for group in parameter_groups:
        group["params"] = [parts[id(parameter)] for parameter in group["params"]]
    return Skeleton(groups, parameter_groups, _buffer_bytes(model))


def _of_parameter(part: Tensor, knobs: Knobs, compute: int, *, nf4: bool, fp8: bool) -> Group:
    whole = part.numel() * knobs.fsdp  # rank 0 has the longest part: the others are padded to it
    trained = part.requires_grad
    kept = part.numel() * part.element_size()
    if nf4 and not trained:
        # Half a byte a weight, a byte for each 64 and four for each row; gathered and kept that way.
        kept = part.numel() // 2 + part.numel() // BLOCK + 4 * part.shape[0]
        copied = kept * knobs.fsdp if knobs.fsdp > 1 else 0  # one shard is used as it is
        return Group(sharded=kept, gathered=copied, sent=copied, largest=whole * compute)
    travels = 1 if fp8 else compute
    return Group(
        sharded=kept,
        gathered=whole * travels,
        sent=whole * travels,
        cast=part.numel() * travels if part.element_size() != travels else 0,
        trained=whole if trained else 0,
        gradients=whole * compute if trained else 0,
        largest=whole * travels,
    )


def _buffer_bytes(model: LlamaDecoder) -> int:
    # RoPE caches are built once there is memory: cos and sin of half the features at each position.
    ropes = {m for m in model.modules() if hasattr(m, "rope_init")}
    caches = sum(4 * rope.max_seq_len * rope.dim for rope in ropes)
    own = {id(b) for rope in ropes for b in rope.buffers()}
    return caches + sum(b.numel() * b.element_size() for b in model.buffers() if id(b) not in own)


def compute_dtype(cfg: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
