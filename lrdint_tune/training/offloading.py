"""What is kept for the backward pass waits in the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.autograd.graph import saved_tensors_hooks
from torchtune.training import OffloadActivations

from lrdint_tune.models.decoder import LlamaDecoder


def offload_activations(model: LlamaDecoder) -> None:
    """Send what autograd saves in a block to the CPU in the forward pass and bring it back in the backward pass.

    With every block checkpointed that is its input. What ``ac_mode: selective`` keeps is not autograd's and stays.
    The loss comes after the blocks, and saves what the backward pass wants at once: nothing of it travels.

    Call it after activation checkpointing was set up, whose recomputation then happens inside. CUDA only.
    """
    hooks = OffloadActivations()
    for layer in model.layers:
        layer.forward = partial(_within, hooks, layer.forward)


def _within(hooks: saved_tensors_hooks, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with hooks:
        return forward(*args, **kwargs)
