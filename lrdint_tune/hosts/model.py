"""What a training loop asks of a ``transformers`` model that carries a method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from lrdint_tune.attention import AttentionMethod, calibration
from lrdint_tune.errors import ConfigError
from lrdint_tune.hosts.attach import Attached, attached

TRAINABLE_GROUPS = ("adapter", "attention", "head", "all")


def state_of(model: nn.Module) -> Attached:
    """What was attached to ``model``. Raises ConfigError if nothing was."""
    state = attached(model)
    if state is None:
        raise ConfigError(f"model={type(model).__name__}: has no method; call lrdint_tune.hosts.attach first")
    return state


def max_length(model: Any) -> int:
    """The longest sequence, in tokens."""
    limit = model.config.max_position_embeddings
    if state_of(model).architecture.name == "RobertaForSequenceClassification":
        limit -= model.config.pad_token_id + 1  # its positions count from behind the padding's
    return limit


def methods(model: nn.Module) -> list[AttentionMethod]:
    """Each layer's method, encoder first."""
    return [cast(AttentionMethod, layer.attention.method) for layer in state_of(model).layers(model)]


def method_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every new tensor of ``model`` (the methods', saved buffers included, and the adapters'): state-dict name ->
    tensor."""
    new = tuple(_new_modules(model))
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(new)}


def method_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The new parameters only: name -> parameter."""
    new = tuple(_new_modules(model))
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(new)}


def _new_modules(model: nn.Module) -> Iterator[str]:
    layers = state_of(model).layers(model)
    owners = {id(layer.attention): "method" for layer in layers} | {id(layer.ffn_out): "bottleneck" for layer in layers}
    for name, module in model.named_modules():
        if id(module) in owners:
            yield f"{name}.{owners[id(module)]}."


def set_trainable(model: nn.Module, groups: Iterable[str] = ("adapter",)) -> None:
    """Set ``requires_grad`` of every parameter.

    Args:
        model: with a method.
        groups: some of ``adapter`` (the new tensors), ``attention`` (the weights and biases of the self-attention that
            carries a method, its norms left out), ``head`` and ``all``.

    Raises:
        ConfigError: an unknown group, a head that is the embedding matrix, or nothing left to train.
    """
    groups = list(groups)
    state, chosen = state_of(model), set(groups)
    for group in groups:
        if group not in TRAINABLE_GROUPS:
            raise ConfigError(f"trainable={group!r}: unknown; choose from {', '.join(TRAINABLE_GROUPS)}")
    named = dict(model.named_parameters())
    head = {name for name in named if name.startswith(state.architecture.head)}
    if "head" in chosen and not head and "all" not in chosen:
        raise ConfigError("trainable=head: the head is the embedding matrix in this model; add all, or leave it out")
    new = method_parameters(model).keys()
    attention = _attention(model, state) - new
    members = {"adapter": set(new), "attention": attention, "head": head, "all": set(named)}
    trained = set().union(*(members[group] for group in chosen))
    if not trained:
        raise ConfigError(f"trainable={groups}: method {state.method!r} has no such parameter; add attention or all")
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)


def _attention(model: nn.Module, state: Attached) -> set[str]:
    blocks = {id(layer.block) for layer in state.layers(model)}
    names = set()
    for prefix, block in model.named_modules():
        if id(block) not in blocks:
            continue
        for name, module in block.named_modules(prefix=prefix):
            if not isinstance(module, nn.LayerNorm):
                names |= {f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)}
    return names


def advance_schedule(model: nn.Module, step: int) -> None:
    """Set the λ schedules to ``step`` optimizer steps done. Without effect for methods that have none."""
    for method in methods(model):
        method.advance_schedule(step)


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """See :func:`lrdint_tune.attention.calibration.calibrate`."""
    calibration.calibrate(model, methods(model), batches)


def enable_diagnostics(model: nn.Module, enabled: bool = True) -> None:
    """Make the following forwards keep (or no longer keep) the scalars that :func:`diagnostics` returns."""
    for method in methods(model):
        method.enable_diagnostics(enabled)


def diagnostics(model: nn.Module) -> dict[str, float]:
    """Scalars of the last forward with diagnostics enabled, ``{name}/layers.{i}``: λ over heads, ||O2||/||O1||."""
    return {
        f"{name}/layers.{i}": value.item()
        for i, method in enumerate(methods(model))
        for name, value in method.diagnostics().items()
    }
