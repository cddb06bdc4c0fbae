"""One optimizer step of the real trainer, and the same step computed on one plain model, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrdint_tune.attention import DocumentMask
from lrdint_tune.export import save_hf_folder
from lrdint_tune.models import llama3_2
from lrdint_tune.models.hf import iter_hf_folder
from lrdint_tune.training.components import build_loader, build_model, build_tokenizer
from lrdint_tune.training.config import TrainConfig, load_config
from lrdint_tune.training.trainable import set_trainable
from lrdint_tune.training.trainer import Trainer
from lrdint_tune.training.weights import full_tensor, initial_method_state, load_weights
from lrdint_tune.training.world import World, start_world


@dataclass(frozen=True)
class Step:
    """Loss per token, the gradient of every trained tensor, and the names in the state dict."""

    loss: float
    gradients: dict[str, Tensor]
    names: list[str]


def read_config(file: Path, changes: dict[str, Any]) -> TrainConfig:
    """The config of a tiny run, with other values for some dotted keys."""
    config = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        *path, last = key.split(".")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    return load_config(config)


_last: list[Trainer] = []


def start_trainer(file: Path, changes: dict[str, Any]) -> Trainer:
    """A trainer in this process; the one before it is over."""
    for before in _last:
        before.checkpoints.close()
    cfg = read_config(file, changes)
    world = start_world(cfg.device, **cfg.mesh_dims)
    _last[:] = [Trainer(cfg, world)]
    return _last[0]


def selected_heads(file: Path, changes: dict[str, Any]) -> list[list[float]]:
    """Which heads each layer of a ``dex`` with ``heads: top_entropy`` acts on, after the trainer has calibrated."""
    return [method.get_buffer("selected").tolist() for method in start_trainer(file, changes).model.methods()]


def continued_heads(file: Path, changes: dict[str, Any], folder: str) -> list[list[float]]:
    """The heads after a start from a folder whose trained heads are the last of each layer."""
    trainer = start_trainer(file, changes)
    state = {
        name: torch.tensor([0.0, 0.0, 0.0, 1.0]) if name.endswith(".selected") else full_tensor(tensor)
        for name, tensor in trainer.model.state_dict().items()
    }
    save_hf_folder(folder, state.items(), trainer.spec, dtype=torch.float32)
    return selected_heads(file, {**changes, "checkpointer": {"checkpoint_dir": folder}})


def trainer_step(file: Path, changes: dict[str, Any], at: int = 0) -> Step:
    """The gradients that the trainer hands to its optimizer when ``at`` steps are done, on the first batch of an epoch.

    Runs on every rank; the result is complete on each.
    """
    trainer = start_trainer(file, changes)
    trainer.step = at
    gradients: dict[str, Tensor] = {}

    def collect() -> None:
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                gradients[name] = full_tensor(parameter.grad).clone()

    trainer.optimizer.step = cast(Callable[..., Any], collect)
    values, *_ = trainer._train_step(logging_step=False)
    return Step(values["loss_metrics/global_avg_loss"], gradients, list(trainer.model.state_dict()))


def traffic(file: Path, changes: dict[str, Any]) -> tuple[dict[str, list[int]], int]:
    """For each kind of collective the elements that each of one step takes from this rank, and how many parameters are
    trained.

    (torch's own communication debug mode trips over the RoPE module that all layers share.)
    """
    trainer = start_trainer(file, changes)
    elements: dict[str, list[int]] = {"reduce_scatter": [], "all_reduce": [], "all_gather": []}
    with _Watch() as watch:
        trainer._train_step(logging_step=False)
    for name, functional, args in watch.calls:
        for kind, found in elements.items():
            if kind in name.replace("allreduce", "all_reduce").replace("allgather", "all_gather"):
                # The functional ones have the tensor first, those of c10d the output before the input.
                sent = args[0] if functional or kind == "all_reduce" else args[1]
                found.append(sum(t.numel() for t in tree_leaves(sent) if isinstance(t, Tensor)))
    return elements, sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def gathers(file: Path, changes: dict[str, Any]) -> int:
    """How often one step gathers parameters."""
    trainer = start_trainer(file, changes)
    with _Watch() as watch:
        trainer._train_step(logging_step=False)
    return sum(name.startswith("_allgather_base") for name, *_ in watch.calls)


class _Watch(TorchDispatchMode):
    """Every operation's name, whether it is a functional collective, and its positional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, bool, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.__name__, "c10d_functional" in str(func), args))
        return func(*args, **(kwargs or {}))


def reduced_elements(file: Path, changes: dict[str, Any]) -> tuple[list[int], int]:
    """The elements that each reduce-scatter of one step takes from this rank, and how many parameters are trained."""
    elements, trained = traffic(file, changes)
    return elements["reduce_scatter"], trained


def losses(file: Path, changes: dict[str, Any], steps: int = 10) -> list[float]:
    """The training losses of the first steps."""
    trainer = start_trainer(file, changes)
    return [trainer._train_step(logging_step=False)[0]["loss_metrics/global_avg_loss"] for _ in range(steps)]


def plain_step(file: Path, changes: dict[str, Any], at: int = 0) -> Step:
    """The same on one unsharded model: ``cross_entropy`` of the whole global batch's logits, one backward pass."""
    cfg = read_config(file, changes)
    assert cfg.global_batch_size is not None
    cfg = read_config(file, {**changes, "batch_size": cfg.global_batch_size})
    world = World(rank=0, size=1, device=torch.device("cpu"), mesh=cast(DeviceMesh, None))
    batch = build_loader("dataset", cfg.dataset, cfg, world, build_tokenizer(cfg.tokenizer)).next_batch()

    skeleton = build_model(cfg, total_steps=1)
    model = llama3_2(**{k: v for k, v in cfg.model.items() if k != "_component_"})
    set_trainable(model, cfg.trainable)
    load_weights(model, initial_method_state(skeleton, cfg.seed).items(), complete=False)
    load_weights(model, iter_hf_folder(cfg.checkpointer["checkpoint_dir"], model.spec), complete=False)
    model.advance_schedule(at)
    logits = model(batch.tokens, mask=DocumentMask(batch.lengths), input_pos=batch.input_pos)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss.item(), gradients, list(model.state_dict()))


def assert_same_step(
    actual: Step, expected: Step, *, loss: float = 1e-6, gradients: float = 1e-4, asleep: tuple[str, ...] = ()
) -> None:
    """Relative tolerances; a gradient's is relative to its largest element, and it must not be all zero, except for
    names ending in one of ``asleep``, which must be zero on both sides."""
    assert actual.names == expected.names
    assert actual.gradients.keys() == expected.gradients.keys()
    assert abs(actual.loss - expected.loss) <= loss * expected.loss, (actual.loss, expected.loss)
    for name, gradient in expected.gradients.items():
        largest = gradient.abs().max()
        if name.endswith(asleep):
            assert largest == 0 and (actual.gradients[name] == 0).all(), f"{name}: is awake"
            continue
        assert largest > 0, f"{name}: the gradient is zero, nothing is compared"
        error = (actual.gradients[name] - gradient).abs().max() / largest
        assert error <= gradients, f"{name}: relative error {error:.2e}"
