"""What the benchmark builds and feeds; the tests use the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.listing import Listing
from lrdint_tune.attention import AttentionShape
from lrdint_tune.models import LlamaDecoder, llama3_2

VARIANTS = ("none", "dint", "listing")
SCOPES = ("attention", "layer", "step")
LAMBDA = 0.3  # anything but 0, where a wrong branch would not show


@dataclass(frozen=True)
class Size:
    """Real widths of a model, cut to two layers and to the same share of its vocabulary."""

    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    vocab_size: int
    rope_base: int
    scale_factor: int
    num_layers: int = 2

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.embed_dim, self.num_heads, self.num_kv_heads, self.embed_dim // self.num_heads)


SIZES = {
    "llama3_2_1b": Size(32, 8, 2048, 8192, 16_032, 500_000, 32),  # 2 of 16 layers, 128256 * 2 / 16 tokens
    "smollm2_135m": Size(9, 3, 576, 1536, 3_277, 100_000, 1),  # 2 of 30 layers, 49152 * 2 / 30 tokens
    "tiny": Size(4, 2, 32, 48, 64, 10_000, 1),
}


def build_model(size: Size, variant: str, length: int, **options: Any) -> LlamaDecoder:
    """One variant, with λ away from 0 and only the attention trainable (``trainable: [adapter, attention]``).

    Args:
        variant: ``none``, ``dint``, or ``listing`` (the parameters of ``dint``, another forward).
        length: the longest sequence.
        options: ``attention_backend`` and, for ``dint``, the method's options.
    """
    method = "none" if variant == "none" else "dint"
    model = llama3_2(**asdict(size), max_seq_len=length, method=method, **options)
    for i in range(size.num_layers):
        attention = model.attention(i)
        if variant == "listing":
            attention.method = Listing(size.shape)
        if variant != "none":
            nn.init.constant_(attention.method.get_parameter("lam.value"), LAMBDA)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".attn." in name)
    return model


def build_models(
    size: Size, length: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, LlamaDecoder]:
    """All variants, with the same weights. ``options`` are those of ``dint``."""
    torch.manual_seed(0)
    models = {v: build_model(size, v, length, **(options if v == "dint" else {})) for v in VARIANTS}
    state = models["dint"].state_dict()
    for model in models.values():
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        model.to(device=device, dtype=dtype)
    return models


class Case:
    """One measured piece of work, repeatable: ``run()`` leaves no gradients behind.

    Args:
        model: any variant.
        scope: ``attention`` (the module of layer 0), ``layer`` (layer 0) or ``step`` (the model with loss and AdamW).
        length: ``N``; the batch is one sequence.
    """

    def __init__(self, model: LlamaDecoder, scope: str, length: int) -> None:
        weight = model.tok_embeddings.weight
        self.scope = scope
        self.module: nn.Module = {"attention": model.attention(0), "layer": model.layers[0], "step": model}[scope]
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(model.spec.vocab_size, (1, length + 1), generator=generator).to(weight.device)
        shape = (2, 1, length, model.spec.embed_dim)
        x, self.gradient = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
        self.x = x.requires_grad_()  # inside a model the layer below needs this gradient
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        if scope == "step":
            # A first step on zero gradients creates the optimizer's state, which belongs to the resting memory.
            for p in trained:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def forward_backward(self) -> None:
        if self.scope == "step":
            tokens, labels = self.tokens[:, :-1], self.tokens[:, 1:]
            (self.module(tokens, labels=labels) / labels.numel()).backward()
        else:
            self.module(self.x).backward(self.gradient)

    def run(self) -> None:
        self.forward_backward()
        if self.scope == "step":
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Name -> gradient of one forward and backward."""
        self.forward_backward()
        gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        self.x.grad = None
        return gradients
