"""A torchtune decoder that knows about its methods, and can return a loss without ever holding the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from lrdint_tune.adapters import TARGETS, attach_adapters, check_adapters, is_merged
from lrdint_tune.attention import AttentionMethod, DifferentialSelfAttention, Layout
from lrdint_tune.attention.calibration import calibrate
from lrdint_tune.attention.layout import MaskType
from lrdint_tune.attention.sequence_shard import SequenceShard
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.loss import summed_cross_entropy, token_cross_entropy
from lrdint_tune.models.spec import ModelSpec
from lrdint_tune.models.tensor_shard import TensorShard, whole


class LlamaDecoder(TransformerDecoder):
    """torchtune's ``TransformerDecoder`` with differential attention.

    Args:
        spec: what was built, for weight mapping, export and checks.
        kwargs: those of ``TransformerDecoder``.

    Attributes:
        sequence_shard: None, or which part of every sequence this process computes (context parallelism).
        tensor_shard: None, or this process among those that share the heads and the MLP (tensor parallelism).
        layers_are_compiled: whether what the layers read of a mask must be there, as tensors, before they run.
    """

    def __init__(self, spec: ModelSpec, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._spec = spec
        self.sequence_shard: SequenceShard | None = None
        self.tensor_shard: TensorShard | None = None
        self.layers_are_compiled = False

    @property
    def spec(self) -> ModelSpec:
        """What the model is now: merged adapters are no longer part of it."""
        return dataclasses.replace(self._spec, adapters=[]) if is_merged(self) else self._spec

    def attach_adapters(self, adapters: list[dict[str, Any]]) -> None:
        """Add adapters, in the form that the builders take.

        It is the last step of building a model: what replaces linear layers (conversion to fp8) comes before.

        Raises:
            ConfigError: a bad entry, a type that the model has already, or merged adapters.
        """
        if is_merged(self):
            raise ConfigError(f"adapters={adapters!r}: the model's adapters are merged; call unmerge_adapters() first")
        before = self._spec.adapters
        after = check_adapters([*before, *adapters])
        attach_adapters(self.layers, after[len(before) :])
        self._spec = dataclasses.replace(self._spec, adapters=after)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: MaskType = None,
        input_pos: Tensor | None = None,
        labels: Tensor | None = None,
        per_token: bool = False,
    ) -> Any:
        """
        Args:
            tokens: int64 ``[B, N]``.
            mask: None (causal), bool ``[B, N, M]``, ``BlockMask`` or :class:`~lrdint_tune.attention.DocumentMask`.
            input_pos: int64 ``[B, N]`` or ``[N]``; restarts at 0 with each packed document.
            labels: int64 ``[B, N]``, already shifted (``labels[i]`` is what position ``i`` must predict); -100 is
                ignored.
            per_token: with ``labels``, return each token's loss instead of their sum; there is no gradient.

        Returns:
            Without labels the logits, float32 ``[B, N, vocab]`` (torchtune's lists, if output chunks or hidden states
            were asked for). With labels the SUM of the token losses in nats, a float32 scalar, computed chunk by chunk
            so that ``[tokens, vocab]`` never exists whole. With ``per_token`` the losses ``[B, N]`` and whether the
            label is the most likely token, bool ``[B, N]``, see :func:`~lrdint_tune.models.loss.token_cross_entropy`.

        With a ``sequence_shard`` all arguments and the logits are still those of the whole sequence, but the loss is
        that of this process's rows.

        Raises:
            ValueError: too long an input, one that ``sequence_shard`` does not divide, a mask or positions that do not
                fit, or ``per_token`` where processes share a sequence or a layer.
        """
        if per_token and (self.sequence_shard is not None or self.tensor_shard is not None):
            raise ValueError("per_token=True: not there under context or tensor parallelism; evaluate without them")
        self._validate_inputs(tokens.shape[1], mask=cast(Any, mask), input_pos=input_pos)
        offset = self.attention(0).kv_cache.size if self.caches_are_enabled() else 0  # type: ignore[union-attr]
        # Built once: the layers share what is derived from it.
        shard = self.sequence_shard
        if shard is not None:
            tokens = shard.take(tokens)
            labels = None if labels is None else shard.take(labels)
            input_pos = None if input_pos is None else shard.take(input_pos)
        b, n = tokens.shape
        layout = Layout(mask, input_pos, num_queries=n, batch_size=b, offset=offset, device=tokens.device, shard=shard)
        h = self.tok_embeddings(tokens)
        if self.layers_are_compiled:
            self.attention(0).prepare(layout, h.dtype)
        hidden = []
        for i, layer in enumerate(self.layers):
            if i in self.output_hidden_states:
                hidden.append(h)
            h = layer(h, mask=layout, input_pos=layout.input_pos)
        h = self.norm(h)
        if labels is None:
            if shard is not None:
                h, hidden = shard.gather(h, 1), [shard.gather(t, 1) for t in hidden]
            if self.num_output_chunks > 0:
                logits = self.chunked_output(h)
            else:
                logits = F.linear(h, self.output_weight)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return [*hidden, logits] if hidden else logits
        if per_token:
            return token_cross_entropy(h, self.output_weight, labels)
        if self.tensor_shard is None:
            return summed_cross_entropy(h, self.output_weight, labels)
        # Each process has all hidden states and the whole head: it takes some of the tokens.
        part = self.tensor_shard
        h, weight = part.rows(part.enter(h).flatten(0, 1)), whole(self._head.weight, used_in_part=True)
        return part.leave(summed_cross_entropy(h[None], weight, part.rows(labels.flatten())[None]))

    @property
    def output_weight(self) -> Tensor:
        """The output head's weight ``[vocab, D]``, the embeddings' own when they are tied."""
        return whole(self._head.weight)

    @property
    def _head(self) -> nn.Linear | nn.Embedding:
        return self.output if isinstance(self.output, nn.Linear) else self.tok_embeddings

    def base_linears(self) -> dict[str, nn.Linear]:
        """The pretrained linear layers of the blocks, name -> module: none of a method or an adapter, not the head."""
        return {
            f"layers.{i}.{path}": cast(nn.Linear, layer.get_submodule(path))
            for i, layer in enumerate(self.layers)
            for path in TARGETS.values()
        }

    def attention(self, layer: int) -> DifferentialSelfAttention:
        return cast(DifferentialSelfAttention, cast(Any, self.layers[layer]).attn)

    def methods(self) -> list[AttentionMethod]:
        """Each layer's method, in order."""
        return [self.attention(i).method for i in range(len(self.layers))]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The new tensors only: name -> parameter."""
        return {name: p for name, p in self.named_parameters() if is_new_tensor(name)}

    def advance_schedule(self, step: int) -> None:
        """Set the λ schedules to ``step`` optimizer steps done. Without effect for methods that have none."""
        for method in self.methods():
            method.advance_schedule(step)

    @property
    def needs_calibration(self) -> bool:
        """Whether a method wants to see some batches (:meth:`calibrate`) before training."""
        return any(method.needs_calibration for method in self.methods())

    def calibrate(self, batches: Iterable[Mapping[str, Any]], *, reduce: Callable[[Tensor], Any] | None = None) -> None:
        """See :func:`~lrdint_tune.attention.calibration.calibrate`; ``batches`` are arguments of :meth:`forward`."""
        calibrate(self, self.methods(), batches, reduce=reduce)

    def enable_diagnostics(self, enabled: bool = True) -> None:
        """Make the following forwards keep (or no longer keep) the scalars that :meth:`diagnostics` returns."""
        for method in self.methods():
            method.enable_diagnostics(enabled)

    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars of the last forward with diagnostics enabled, ``{name}/layers.{i}`` -> 0-dim float32: λ over heads,
        ||O2||/||O1||."""
        return {
            f"{name}/layers.{i}": value
            for i, method in enumerate(self.methods())
            for name, value in method.diagnostics().items()
        }


def is_new_tensor(name: str) -> bool:
    """True for the state-dict name of a tensor that a method or an adapter brought, False for one of the base."""
    return is_method_tensor(name) or is_adapter_tensor(name)


def is_method_tensor(name: str) -> bool:
    """True for the state-dict name of a tensor of an attention method."""
    return ".attn.method." in name


def is_adapter_tensor(name: str) -> bool:
    """True for the state-dict name of a tensor of one of ``lrdint_tune.adapters``."""
    return ".adapters." in name
