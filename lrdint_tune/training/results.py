"""What a finished run leaves behind: the adapter folder and the whole model under Hugging Face names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lrdint_tune.errors import NotSavedError
from lrdint_tune.export import save_adapter, save_hf_folder
from lrdint_tune.models.decoder import LlamaDecoder, is_new_tensor
from lrdint_tune.training.config import TrainConfig
from lrdint_tune.training.precision import file_dtype
from lrdint_tune.training.weights import full_tensor

log = logging.getLogger(__name__)

Tensors = Iterable[tuple[str, Tensor]]


def write_results(model: LlamaDecoder, cfg: TrainConfig) -> None:
    """Write ``output_dir/adapter`` (not for a stock Llama) and ``output_dir/hf``; every rank must call it.

    Gathering is a collective, tensor by tensor; rank 0 writes and holds one whole tensor at a time. The model is only
    read.

    Args:
        model: sharded.
        cfg: ``output_dir``, ``checkpointer``, ``trainable`` and ``dtype`` are used.

    Raises:
        NotSavedError: on all ranks, when rank 0 cannot write.
    """
    output_dir, source = Path(cfg.output_dir), cfg.checkpointer["checkpoint_dir"]
    state = model.state_dict()
    if not model.spec.is_stock:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        changed = {name: tensor for name, tensor in state.items() if is_new_tensor(name) or name in trained}
        _write(
            output_dir / "adapter",
            changed,
            lambda folder, tensors: save_adapter(
                folder,
                tensors,
                model.spec,
                dtypes={name: tensor.dtype for name, tensor in changed.items()},
                base_model_name_or_path=cfg.checkpointer.get("base_model_name_or_path") or source,
                trainable=list(cfg.trainable),
            ),
        )
    _write(
        output_dir / "hf",
        state,
        lambda folder, tensors: save_hf_folder(
            folder, tensors, model.spec, dtype=file_dtype(cfg.dtype), tokenizer_files_from=source
        ),
    )


def _write(folder: Path, state: Mapping[str, Tensor], save: Callable[[Path, Tensors], None]) -> None:
    """Gather ``state`` and let rank 0 ``save`` it; a disk that is full is known to every rank."""
    tensors = ((name, full_tensor(tensor)) for name, tensor in state.items())
    problem: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            save(folder, tensors)
            log.info("saved %s", folder)
        except OSError as error:
            problem = [f"{folder} was not written: {error}; the last checkpoint stands: make room and start again"]
    for _ in tensors:  # every rank takes part in every gathering, whatever became of rank 0's writing
        continue
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise NotSavedError(problem[0])
