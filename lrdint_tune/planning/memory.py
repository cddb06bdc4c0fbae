"""The bytes that one rank holds, moment by moment through a step; the peak is that of a moment, not a sum of peaks.

The order of events is FSDP2's (torch 2.13): a group is gathered into one buffer and copied out of it; in the forward
pass the buffer lives until the next group is gathered, in the backward pass the previous block is gathered while one is
computed; the root's parameters stay gathered; the input of a reduce-scatter lives until the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lrdint_tune.planning.knobs import Knobs
from lrdint_tune.planning.parts import Part, Parts
from lrdint_tune.planning.skeleton import ROOT, Group, Skeleton

PARAMETERS = "parameters"
GATHERED = "gathered parameters"
GRADIENTS = "gradients"
IN_FLIGHT = "gradients in flight"
OPTIMIZER = "optimizer state"
ACTIVATIONS = "activations"
LOSS = "logits and loss"
OTHER = "buffers and inputs"
KINDS = (PARAMETERS, GATHERED, GRADIENTS, IN_FLIGHT, OPTIMIZER, ACTIVATIONS, LOSS, OTHER)


@dataclass(frozen=True)
class Memory:
    """Of one rank, in bytes.

    Attributes:
        peak: by kind, at the moment when their sum is largest.
        moment: which that is.
        host: bytes in the CPU's memory, when something is offloaded.
    """

    peak: Mapping[str, int]
    moment: str
    host: int

    @property
    def total(self) -> int:
        return sum(self.peak.values())


class _Tape:
    """What is held now, and the moment when it was most."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.moment = ""

    def hold(self, kind: str, size: int) -> None:
        self.held[kind] += size

    def free(self, kind: str, size: int) -> None:
        self.held[kind] -= size

    def at(self, moment: str, **briefly: int) -> None:
        """Look at what is held, with what is held at this moment only."""
        now = self.held + Counter({_BRIEFLY[name]: size for name, size in briefly.items()})
        if now.total() > sum(self.peak.values()):
            self.peak, self.moment = {kind: now[kind] for kind in KINDS}, moment


_BRIEFLY = {
    "gathered": GATHERED,
    "in_flight": IN_FLIGHT,
    "activations": ACTIVATIONS,
    "loss": LOSS,
    "optimizer": OPTIMIZER,
}


def estimate_memory(
    skeleton: Skeleton, parts: Parts, optimizer: tuple[int, int], knobs: Knobs, *, num_layers: int, device: str
) -> Memory:
    """Follow one optimizer step, its last micro-batch, when everything is there that lasts.

    Args:
        optimizer: bytes of its state, and held in a step beside it.
        device: ``cpu`` or ``cuda``; gloo on a CPU reduces and gathers through copies.
    """
    return _Step(skeleton, parts, optimizer, knobs, num_layers, device).run()


class _Step:
    def __init__(
        self,
        skeleton: Skeleton,
        parts: Parts,
        optimizer: tuple[int, int],
        knobs: Knobs,
        num_layers: int,
        device: str,
    ) -> None:
        self.parts, self.knobs, self.num_layers = parts, knobs, num_layers
        self.groups, self.buffers = skeleton.groups, skeleton.buffers
        self.state, self.scratch = optimizer
        self.copies = device == "cpu"
        self.tape = _Tape()
        self.host = 0
        self.gather_buffer = self.reduce_buffer = 0
        # Kept between the blocks' forward and backward passes.
        self.blocks = [self._block(i) for i in range(num_layers)]

    def _block(self, i: int) -> Part:
        return (self.parts.middle if i else self.parts.first)[self.knobs.checkpointed(i)]

    def _group(self, i: int) -> Group:
        return self.groups[f"layers.{i}"]

    def run(self) -> Memory:
        self._rest()
        self._forward()
        self._loss()
        self._backward()
        self.tape.at("optimizer step", optimizer=0 if self.knobs.cpu_offload else self.scratch)
        return Memory(self.tape.peak, self.tape.moment, self.host)

    def _rest(self) -> None:
        """What is there before a micro-batch begins."""
        tape, knobs = self.tape, self.knobs
        sharded = sum(group.sharded for group in self.groups.values())
        if knobs.cpu_offload:
            self.host += sharded + self.state
        else:
            tape.hold(PARAMETERS, sharded)
            tape.hold(OPTIMIZER, self.state)
        tape.hold(OTHER, self.buffers + self.parts.layout)
        # Earlier passes of the step left whole gradients, in the dtype in which they will be reduced.
        if knobs.passes > 1:
            tape.hold(IN_FLIGHT, sum(self._accumulated(group) for group in self.groups.values()))

    def _accumulated(self, group: Group) -> int:
        return 4 * group.trained if self.knobs.passes > 1 else 0

    # ------------------------------------------------------------------ parameters

    def _start_gather(self, group: Group) -> None:
        """The buffer of an all-gather; with one shard there is none."""
        if self.knobs.fsdp > 1:
            self.tape.hold(GATHERED, group.sent)
            self.gather_buffer += group.sent
            self.tape.at("all-gather", gathered=group.cast + (group.sent if self.copies else 0))

    def _end_gather(self, group: Group, *, keep_buffer: int = 0) -> None:
        """Copy out of the buffer; all of it but ``keep_buffer`` bytes is freed."""
        self.tape.hold(GATHERED, group.gathered)
        self.tape.at("all-gather")
        self.tape.free(GATHERED, self.gather_buffer - keep_buffer)
        self.gather_buffer = keep_buffer

    def _converted(self, group: Group) -> int:
        """A weight in the format in which it is multiplied, where that is another than the gathered one's."""
        if self.knobs.nf4:
            return group.largest
        return group.largest // 2 if self.knobs.fp8 and not self.knobs.fp8_all_gather else 0

    # ------------------------------------------------------------------ passes

    def _forward(self) -> None:
        tape, knobs = self.tape, self.knobs
        previous = 0
        for name in (ROOT, *(f"layers.{i}" for i in range(self.num_layers))):
            group = self.groups[name]
            sent = group.sent if knobs.fsdp > 1 else 0
            self._start_gather(group)
            tape.free(GATHERED, previous)  # the buffer of the group before
            self.gather_buffer -= previous
            self._end_gather(group, keep_buffer=sent)
            previous = sent
            if name == ROOT:
                tape.at("embedding", activations=self.parts.embedding.forward)
                continue
            i = int(name.split(".")[1])
            block = self.blocks[i]
            tape.at("forward pass of a block", activations=block.forward, gathered=self._converted(group))
            self._keep(i)
            if knobs.reshard:
                tape.free(GATHERED, group.gathered)

    def _keep(self, i: int) -> None:
        """Hold what the backward pass of block ``i`` will want, or send it away once the next block is there."""
        self.tape.hold(ACTIVATIONS, self.blocks[i].kept)
        if self.knobs.activation_offloading and i:
            self.tape.free(ACTIVATIONS, self.blocks[i - 1].kept)
            self.host += self.blocks[i - 1].kept

    def _loss(self) -> None:
        tape, loss = self.tape, self.parts.loss
        tape.at("loss", activations=loss.inputs, loss=loss.forward - loss.inputs)
        tape.hold(LOSS, loss.kept)
        tape.free(GATHERED, self.gather_buffer)
        self.gather_buffer = 0
        if self.knobs.reshard:
            self._start_gather(self._group(self.num_layers - 1))
        tape.free(LOSS, loss.kept)
        tape.at("backward pass of the loss", loss=loss.backward, in_flight=self._new(self.groups[ROOT], loss.gradients))

    def _new(self, group: Group, gradients: int) -> int:
        """What ``gradients`` add to those of earlier passes: in float32 they are summed in place."""
        in_place = self.knobs.passes > 1 and group.gradients == 4 * group.trained
        return group.largest if in_place and gradients else gradients

    def _backward(self) -> None:
        tape, knobs = self.tape, self.knobs
        # The root's gradients wait for the end of the backward pass: the loss's, then the embedding's.
        root_gradients = self._new(self.groups[ROOT], self.parts.loss.left)
        tape.hold(IN_FLIGHT, root_gradients)
        for i in reversed(range(self.num_layers)):
            block, group = self.blocks[i], self._group(i)
            if knobs.reshard:
                self._end_gather(group)
                if i:
                    self._start_gather(self._group(i - 1))
            if knobs.activation_offloading and i:
                tape.hold(ACTIVATIONS, self.blocks[i - 1].kept)
            tape.free(ACTIVATIONS, block.kept)
            tape.at(
                "backward pass of a block",
                activations=block.backward,
                gathered=self._converted(group),
                in_flight=self._new(group, block.gradients),
            )
            tape.hold(ACTIVATIONS, block.inputs)  # its gradient
            self._reduce(group)
            tape.free(ACTIVATIONS, block.inputs)
        embedding = self.parts.embedding
        new = self._new(self.groups[ROOT], embedding.gradients)
        tape.at("backward pass of the embedding", activations=embedding.backward, in_flight=new)
        tape.free(IN_FLIGHT, root_gradients)
        self._reduce(self.groups[ROOT])
        tape.free(IN_FLIGHT, self.reduce_buffer)

    def _reduce(self, group: Group) -> None:
        """Free the gathered parameters, make shards of the gradients."""
        tape, knobs = self.tape, self.knobs
        tape.free(GATHERED, group.gathered)
        if not group.trained:
            return
        tape.free(IN_FLIGHT, self.reduce_buffer)
        accumulated = self._accumulated(group)
        whole = accumulated or group.gradients
        self.reduce_buffer = 4 * group.trained
        tape.hold(IN_FLIGHT, self.reduce_buffer)
        tape.at("reduce-scatter", in_flight=whole - accumulated)
        tape.free(IN_FLIGHT, accumulated)
        shard = 4 * group.trained // knobs.fsdp
        tape.hold(GRADIENTS, shard)
        tape.at("reduce-scatter", in_flight=self.reduce_buffer if self.copies and knobs.fsdp > 1 else 0)
        if knobs.cpu_offload:
            self.host += shard
        if knobs.cpu_offload or knobs.optimizer_in_bwd:
            tape.free(GRADIENTS, shard)
