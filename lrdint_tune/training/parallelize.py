"""From a whole model on the meta device to this rank's part of it: every change to the modules, in the one order that
is right."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.activations import checkpoint_activations
from lrdint_tune.training.compilation import check_compiler, compile_blocks
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.precision import set_precision
from lrdint_tune.training.sharding import shard_model


def parallelize(model: LlamaDecoder, cfg: TrainConfig, mesh: DeviceMesh) -> None:
    """Make ``model`` (meta device, ``requires_grad`` set) the model that ``cfg`` trains on ``mesh``, without memory."""
    set_precision(model, cfg.dtype)
    if cfg.enable_activation_checkpointing:
        checkpoint_activations(model, cfg.ac_mode, cfg.ac_option)
    if cfg.compile:
        check_compiler(mesh.device_type)
        compile_blocks(model)
    shard_model(model, mesh, cfg.dtype)
