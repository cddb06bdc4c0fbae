"""Which parameters are trained, and in which optimizer group."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder, is_new_tensor

log = logging.getLogger(__name__)

LAMBDA_GROUP = "lambda"
TRAINABLE_GROUPS = ("adapter", "attention", "norms", "mlp", "embeddings", "lm_head", "all")


def group_of(name: str) -> str:
    """The group of a parameter by its state-dict name: ``adapter`` for the new tensors of method and adapters, else the
    part of the Llama it is."""
    if is_new_tensor(name):
        return "adapter"
    if ".attn." in name:
        return "attention"
    if ".mlp." in name:
        return "mlp"
    if name.startswith("tok_embeddings."):
        return "embeddings"
    if name.startswith("output."):
        return "lm_head"
    return "norms"


def set_trainable(model: LlamaDecoder, groups: list[str]) -> None:
    """Set ``requires_grad`` of every parameter according to ``groups``.

    Raises:
        ConfigError: ``lm_head`` without ``embeddings`` on a tied model, or nothing left to train.
    """
    if "lm_head" in groups and model.spec.tie_word_embeddings and not {"embeddings", "all"} & set(groups):
        raise ConfigError(
            "trainable=lm_head: the head is the embedding matrix in this model; add embeddings, or set "
            "untie_lm_head=true to give "
            "the head its own copy"
        )
    if "adapter" in groups and model.spec.is_stock:
        log.info("trainable: method none has no adapter parameters")
    wanted = set(groups)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("all" in wanted or group_of(name) in wanted)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"trainable={groups}: no parameter of method {model.spec.method!r} is in these groups; add attention or all"
        )


def parameter_table(model: nn.Module) -> str:
    """A table of trainable and frozen parameters by group, for the start of a run."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = counts.setdefault(group_of(name), [0, 0])
        row[0 if parameter.requires_grad else 1] += parameter.numel()
    counts["total"] = [sum(row[i] for row in counts.values()) for i in (0, 1)]
    lines = [f"{'group':<12}{'trainable':>16}{'frozen':>16}"]
    lines += [
        f"{group:<12}{counts[group][0]:>16,}{counts[group][1]:>16,}"
        for group in (*TRAINABLE_GROUPS, "total")
        if group in counts
    ]
    return "\n".join(lines)


def is_lambda(name: str) -> bool:
    return ".attn.method.lam." in name


def optimizer_groups(model: nn.Module, *, lam_lr: float | None) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer: the λ parameters apart, with their own learning rate and no weight decay.

    One-dimensional parameters (norm scales) are not decayed either. A ``lam_lr`` without any trained λ is reported as
    having no effect.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    lambdas = [p for n, p in named if is_lambda(n)]
    scales = [p for n, p in named if not is_lambda(n) and p.dim() < 2]
    matrices = [p for n, p in named if not is_lambda(n) and p.dim() >= 2]
    groups: list[dict[str, Any]] = []
    if matrices:
        groups.append({"params": matrices})
    if scales:
        groups.append({"params": scales, "weight_decay": 0.0})
    if lambdas:
        own = {} if lam_lr is None else {"lr": lam_lr}
        groups.append({"params": lambdas, "weight_decay": 0.0, "name": LAMBDA_GROUP, **own})
    elif lam_lr is not None:
        log.warning("lam_lr=%s has no effect: no λ is trained", lam_lr)
    return groups
