"""torch.compile, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lrdint_tune.models.decoder import LlamaDecoder

_BACKEND = "inductor"

# Variants of a block: with and without gradients or diagnostics, causal or packed, shapes that turned out to change,
# and constants of a layer's own. More than these are a fault, which torch then reports.
_VARIANTS = 64


def compile_blocks(model: LlamaDecoder) -> None:
    """Compile the forward of each block, as one graph; blocks alike share the code.

    Only ``forward`` is replaced: parameter names stay as they are, and FSDP2's hooks outside. A checkpointed forward is
    compiled with its checkpoint, or the compiler would not know what to keep.
    """
    for layer in model.layers:
        layer.forward = torch.compile(  # type: ignore[call-overload]  # its types lack recompile_limit
            layer.forward, fullgraph=True, backend=_BACKEND, recompile_limit=_VARIANTS
        )
    model.layers_are_compiled = True


@contextmanager
def uncompiled(model: LlamaDecoder) -> Iterator[None]:
    """Run the blocks as they are: for a few forwards that would need a variant of their own."""
    compiled, model.layers_are_compiled = model.layers_are_compiled, False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.layers_are_compiled = compiled
