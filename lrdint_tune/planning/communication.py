"""What one rank's collectives move in an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.planning.knobs import Knobs
from lrdint_tune.planning.skeleton import ROOT, Group
from lrdint_tune.training.tensor_parallel import shared_in_part

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
FORWARD, BACKWARD, RECOMPUTATION = "forward", "backward", "recomputation"


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over one dimension of the mesh.

    Attributes:
        kind: ``all-gather | reduce-scatter | all-reduce``.
        dimension: ``shard | replicate | tensor | context``.
        phase: of the step in which they happen.
        ranks: that take part in each.
        count: per step.
        bytes: of their whole buffers together, per step: what an all-gather gives, what the others take.
        overlaps: whether they run beside computation; the others stand between two products.
    """

    kind: str
    dimension: str
    phase: str
    ranks: int
    count: int
    bytes: int
    overlaps: bool

    @property
    def wire_bytes(self) -> float:
        """What this rank sends (and receives) in a ring."""
        once = self.bytes * (self.ranks - 1) / self.ranks
        return 2 * once if self.kind == ALL_REDUCE else once


def step_traffic(
    groups: dict[str, Group], model: LlamaDecoder, knobs: Knobs, *, seq_len: int, element: int
) -> list[Traffic]:
    """Every collective of a step that grows with the model or the batch.

    Args:
        groups: FSDP's, of one rank.
        model: the whole one.
        seq_len: tokens of a sequence.
        element: bytes of an activation.
    """
    shards, passes = knobs.fsdp, knobs.passes
    blocks = [group for name, group in groups.items() if name != ROOT]
    trained = [group for group in groups.values() if group.trained]
    found = []

    def add(
        kind: str, dimension: str, phase: str, ranks: int, sizes: Sequence[int], times: int, overlaps: bool
    ) -> None:
        if ranks > 1 and sizes and times:
            found.append(Traffic(kind, dimension, phase, ranks, len(sizes) * times, sum(sizes) * times, overlaps))

    add(ALL_GATHER, "shard", FORWARD, shards, [group.sent for group in groups.values()], passes, True)
    again = [group.sent for group in blocks] if knobs.reshard else []
    add(ALL_GATHER, "shard", BACKWARD, shards, again, passes, True)
    # Gradients of earlier passes stay on their rank; float32 travels.
    add(REDUCE_SCATTER, "shard", BACKWARD, shards, [4 * group.trained for group in trained], 1, True)
    add(ALL_REDUCE, "replicate", BACKWARD, knobs.replicate, [4 * g.trained // shards for g in trained], 1, True)

    # Behind the attention's output projection and the MLP's, and the same for the gradients of their inputs and of the
    # head's; a first block behind frozen embeddings wants none.
    rows = knobs.batch_size * seq_len // knobs.context
    stream = rows * model.spec.embed_dim * element
    layers = model.spec.num_layers
    # A collective is no product, selective checkpointing runs it again too; the MLP's is not wanted again.
    recomputed = knobs.num_checkpointed(layers)
    back = 2 * layers + model.tok_embeddings.weight.requires_grad
    for phase, count in ((FORWARD, 2 * layers), (BACKWARD, back), (RECOMPUTATION, recomputed)):
        add(ALL_REDUCE, "tensor", phase, knobs.tensor, [stream] * count, passes, False)

    shared = [p.numel() * element for p in shared_in_part(model)]
    add(ALL_REDUCE, "tensor", BACKWARD, knobs.tensor, shared, 1, True)

    # Keys, values and whatever else a method looks back at come from all ranks of a sequence; gradients go back.
    streams = [
        knobs.batch_size * seq_len * model.spec.num_kv_heads // knobs.tensor * model.spec.head_dim * element
        for method in model.methods()
        for _ in range(2 + len(method.cached_streams))
    ]
    add(ALL_GATHER, "context", FORWARD, knobs.context, streams, passes, False)
    again = streams[: len(streams) * recomputed // layers]
    add(ALL_GATHER, "context", RECOMPUTATION, knobs.context, again, passes, False)
    add(REDUCE_SCATTER, "context", BACKWARD, knobs.context, streams, passes, False)
    return found
