"""The parts of a step, each run once on the meta device: what a block, the ends of the model and the optimizer hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lrdint_tune.attention import Backend, DocumentMask, Layout
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.models.loss import summed_cross_entropy
from lrdint_tune.models.spec import ModelSpec
from lrdint_tune.planning.knobs import Knobs
from lrdint_tune.planning.skeleton import compute_dtype, local_model
from lrdint_tune.planning.trace import Held, Kernels, storage_bytes
from lrdint_tune.training.activations import checkpoint_activations
from lrdint_tune.training.config import TrainConfig


@dataclass(frozen=True)
class Part:
    """Bytes of one part of the model in a forward and backward pass.

    Attributes:
        inputs: its input; a gradient has the same.
        forward: the most held in the forward pass, its input included.
        kept: held from there to the backward pass, without its output.
        backward: the most held in the backward pass, what was kept and the output's gradient included, without
            parameters' gradients.
        gradients: the parameters' gradients held at that moment.
        left: those held at the end.
    """

    inputs: int
    forward: int
    kept: int
    backward: int
    gradients: int
    left: int


@dataclass(frozen=True)
class Parts:
    """Of one micro-batch on one rank.

    Attributes:
        first, middle: the block whose input may need no gradient, and any other: recomputed in the backward pass
            (True) or not; what the checkpointing at hand has of these.
        layout: bytes that all blocks share.
    """

    embedding: Part
    first: Mapping[bool, Part]
    middle: Mapping[bool, Part]
    loss: Part
    layout: int


def measure_parts(cfg: TrainConfig, spec: ModelSpec, knobs: Knobs, device: str) -> Parts:
    """Run each part once.

    Args:
        spec: of the whole model.
        device: ``cpu`` or ``cuda``, whose kernels are assumed.

    Raises:
        ConfigError: as building the model does.
    """
    bench = _Bench(cfg, spec, knobs, device)
    modes = {False} if knobs.checkpointing == "none" else {True, False} if knobs.checkpointing == "every_k" else {True}
    return Parts(
        embedding=bench.embedding(),
        first={mode: bench.block(0, recomputed=mode) for mode in modes},
        middle={mode: bench.block(1, recomputed=mode) for mode in modes},
        loss=bench.loss(),
        layout=bench.layout_bytes,
    )


class _Bench:
    """A model of two blocks, with the sizes of one rank, and what is needed to run its parts."""

    def __init__(self, cfg: TrainConfig, spec: ModelSpec, knobs: Knobs, device: str) -> None:
        self.cfg, self.spec, self.knobs = cfg, spec, knobs
        self.dtype = compute_dtype(cfg)
        packed = bool(cfg.dataset.get("packed", False))
        self.models = {False: self._model()}  # by whether blocks are recomputed
        if knobs.checkpointing != "none":
            self.models[True] = self._model()
            mode = "selective" if knobs.checkpointing == "selective" else "full"
            checkpoint_activations(self.models[True], mode)
        model = self.models[False]
        if any(method.needs_document_ends for method in model.methods()):
            raise ConfigError(
                f"model.method={spec.method!r}: with these options its maps lie where the documents end, which no plan "
                "knows; plan with alignment=start"
            )
        flex = model.attention(0).backend is Backend.FLEX or (model.attention(0).backend is Backend.AUTO and packed)
        self.kernels = Kernels(device, flex=device == "cuda" and flex)
        self.shape = (knobs.batch_size, cfg.max_seq_len // knobs.context)  # [B, N]
        positions = torch.empty(self.shape, dtype=torch.int64, device="meta")
        mask = None
        if packed and not self.kernels.flex:  # several documents a row; how many hardly matters
            n = self.shape[1]
            mask = DocumentMask([[n // 2, n - n // 2] if n > 1 else [n]] * self.shape[0])
        with Held([*model.parameters(), *model.buffers()]) as held, torch.no_grad(), self.kernels:
            self.layout = Layout(mask, positions, num_queries=self.shape[1], batch_size=self.shape[0], device="meta")
            # What the first block that asks for it builds for all of them.
            model.layers[0](self._input(), mask=self.layout, input_pos=positions)
        self.layout_bytes = held.now + 3 * positions.numel() * 8  # tokens, labels and positions

    def _model(self) -> LlamaDecoder:
        model = local_model(self.cfg, self.knobs.tensor, num_layers=min(2, self.spec.num_layers))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype)  # as FSDP hands them out
        for module in model.modules():
            if hasattr(module, "rope_init"):  # the cache of scaled RoPE waits for a device
                size = (module.max_seq_len, module.dim // 2, 2)
                module.register_buffer("cache", torch.empty(size, device="meta"), persistent=False)
                module.is_cache_built = True
        model.enable_diagnostics()
        return model

    def _input(self) -> Tensor:
        return torch.empty(*self.shape, self.spec.embed_dim, dtype=self.dtype, device="meta")

    def block(self, index: int, *, recomputed: bool) -> Part:
        model = self.models[recomputed]
        embeddings_trained = model.tok_embeddings.weight.requires_grad
        layer = model.layers[min(index, len(model.layers) - 1)]
        leaf = self._input().requires_grad_(index > 0 or embeddings_trained)
        part = self._run(model, leaf, lambda x: layer(x, mask=self.layout, input_pos=self.layout.input_pos))
        return self._with_gathered_keys(part, model, recomputed=recomputed)

    def _with_gathered_keys(self, part: Part, model: LlamaDecoder, *, recomputed: bool) -> Part:
        """What context parallelism adds: the other ranks' keys, values and further streams, and their gradients."""
        attention, (b, n) = model.attention(0), self.shape
        streams = 2 + len(attention.method.cached_streams)
        rows = (self.knobs.context - 1) * b * n * attention.num_kv_heads * attention.head_dim
        others = streams * rows * self.dtype.itemsize
        return replace(
            part,
            forward=part.forward + others,
            kept=part.kept + (0 if recomputed else others),
            backward=part.backward + 2 * others,
        )

    def loss(self) -> Part:
        model = self.models[False]
        b, n = self.shape
        rows = -(-b * n // self.knobs.tensor)  # tensor-parallel ranks share them
        labels = torch.empty(1, rows, dtype=torch.int64, device="meta")

        def loss(x: Tensor) -> Tensor:
            h = model.norm(x).flatten(0, 1)[None, :rows]
            return summed_cross_entropy(h, model.output_weight, labels)

        return self._run(model, self._input().requires_grad_(), loss)

    def embedding(self) -> Part:
        model = self.models[False]
        tokens = torch.empty(self.shape, dtype=torch.int64, device="meta")
        return self._run(model, tokens, model.tok_embeddings)

    def _run(self, model: nn.Module, leaf: Tensor, function: Callable[[Tensor], Tensor]) -> Part:
        outside = [leaf, *model.parameters(), *model.buffers(), *_tensors_of(self.layout)]
        with self.kernels, Held(outside, model.parameters()) as held:
            # Not a leaf, which autograd would hold.
            x = leaf.clone() if leaf.is_floating_point() else leaf
            inputs = held.now
            out = function(x)
            del x
            forward, output = held.peak, storage_bytes([out])
            if not out.requires_grad:
                return Part(inputs, forward, kept=0, backward=0, gradients=0, left=0)
            kept = held.now - output
            gradient = torch.empty_like(out)
            edge = get_gradient_edge(out)
            del out
            held.restart()
            torch.autograd.backward([edge], [gradient])
            gradients, left = held.gradients_at_peak, held.gradients()
        model.zero_grad(set_to_none=True)
        return Part(inputs, forward, kept, held.peak - gradients, gradients, left)


def _tensors_of(holder: Any) -> Iterator[Tensor]:
    """The tensors among an object's attributes, however deep."""
    if isinstance(holder, Tensor):
        yield holder
    elif isinstance(holder, Mapping):
        for value in holder.values():
            yield from _tensors_of(value)
    elif isinstance(holder, (tuple, list)):
        for value in holder:
            yield from _tensors_of(value)
    elif type(holder).__module__.startswith("lrdint_tune."):
        yield from _tensors_of(vars(holder))
