"""torch.compile, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder

_BACKEND = "inductor"

# Variants of a block: with and without gradients or diagnostics, causal or packed, shapes that turned out to change,
# and constants of a layer's own. More than these are a fault, which torch then reports.
_VARIANTS = 64


def check_compiler(device: str) -> None:
    """That there is something to compile with for ``device`` (cpu or cuda).

    Raises:
        ConfigError: there is not.
    """
    if device == "cuda" and not has_triton():
        raise ConfigError("compile=true: torch cannot use triton here; install it, or set compile=false")
    if device == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ConfigError(
                "compile=true: torch found no C++ compiler; install g++ or set CXX, or set compile=false"
            ) from None


def compile_blocks(model: LlamaDecoder) -> None:
    """Compile the forward of each block, as one graph; blocks alike share the code.

    Only ``forward`` is replaced: parameter names stay as they are, and FSDP2's hooks outside. A checkpointed forward is
    compiled with its checkpoint, or the compiler would not know what to keep.
    """
    options: dict[str, Any] = {"fullgraph": True, "backend": _BACKEND, "recompile_limit": _VARIANTS}
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, **options)
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
