"""What a finished run leaves behind: the adapter folder and the whole model under Hugging Face names."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lrdint_tune.export import save_adapter, save_hf_folder
from lrdint_tune.models.decoder import LlamaDecoder, is_new_tensor
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.weights import full_tensor

log = logging.getLogger(__name__)


def write_results(model: LlamaDecoder, cfg: TrainConfig) -> None:
    """Write ``output_dir/adapter`` (not for a stock Llama) and ``output_dir/hf``; every rank must call it.

    Gathering is a collective, tensor by tensor; rank 0 writes. The model is only read.

    Args:
        model: sharded.
        cfg: ``output_dir``, ``checkpointer``, ``trainable`` and ``dtype`` are used.
    """
    output_dir, source = Path(cfg.output_dir), cfg.checkpointer["checkpoint_dir"]
    is_main = dist.get_rank() == 0
    written = []
    if not model.spec.is_stock:
        new, trained_base = _trained_tensors(model, keep=is_main)
        if is_main:
            save_adapter(
                output_dir / "adapter",
                new,
                model.spec,
                base_model_name_or_path=cfg.checkpointer.get("base_model_name_or_path") or source,
                trained_base=trained_base,
                trainable=list(cfg.trainable),
            )
            written.append(output_dir / "adapter")
    tensors = ((name, full_tensor(tensor)) for name, tensor in model.state_dict().items())
    if is_main:
        dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
        save_hf_folder(output_dir / "hf", tensors, model.spec, dtype=dtype, tokenizer_files_from=source)
        written.append(output_dir / "hf")
        log.info("saved %s", ", ".join(map(str, written)))
    else:
        for _ in tensors:  # take part in the gathering
            continue
    dist.barrier()


def _trained_tensors(model: LlamaDecoder, *, keep: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The new tensors, and the pretrained tensors that were trained; empty on ranks that do not ``keep`` them."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    new: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if is_new_tensor(name) or name in trained:
            whole = full_tensor(tensor)
            if keep:
                (new if is_new_tensor(name) else base)[name] = whole
    return new, base
