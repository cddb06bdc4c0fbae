"""Batches of one data-parallel rank, as a pure function of a position that all ranks share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrdint_tune.attention import DocumentMask
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.loss import IGNORE_INDEX
from lrdint_tune.training.data.datasets import TokenisedDataset
from lrdint_tune.training.data.packing import IntArray, PackPlan, pack_plan

# Width of an unpacked batch is a multiple of this: fp8 products want it, and there are fewer distinct shapes.
_WIDTH_MULTIPLE = 16

_SAME_DATA = ("rows", "tokens", "digest")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: B sequences of N tokens, each holding one or more documents.

    Attributes:
        tokens: int64 [B, N], padded on the right with ``pad_id``.
        labels: int64 [B, N], shifted within each document, -100 where nothing is trained.
        input_pos: int64 [B, N], position inside the document; the padding counts as a document of its own.
        lengths: document lengths of each sequence, padding included: each list sums to N.
        padding: how many tokens at the end of each sequence are padding.
        row_ids: rows of the source in the batch (counting from 0), in order, for messages.
        num_input_tokens: tokens that are not padding.
        num_label_tokens: labels that are not -100.
    """

    tokens: Tensor
    labels: Tensor
    input_pos: Tensor
    lengths: list[list[int]]
    padding: list[int]
    row_ids: list[int]
    num_input_tokens: int
    num_label_tokens: int

    def dense_mask(self) -> Tensor:
        """bool ``[B, N, N]``: each document by itself, causal; rows of padding see nothing and nothing sees them."""
        mask = DocumentMask(self.lengths).to_dense()
        for row, count in enumerate(self.padding):
            mask[row, mask.shape[1] - count :] = False
        return mask


class BatchLoader:
    """Micro-batches of one rank, from a position that all ranks share.

    The epoch is a list of packs (``pack_plan``) that every rank computes alike. A position is the number of packs all
    ranks together have consumed. Each global micro-batch takes the next ``batch_size * dp_size`` packs, rank r the r-th
    ``batch_size`` of them: every (``batch_size``, ``dp_size``, accumulation) with the same global batch sees the same
    packs, in the same order, in each optimizer step.

    ``state_dict()`` belongs between two optimizer steps; it is the same on all ranks and may be loaded with other
    numbers of ranks or batch sizes.

    Args:
        packed: True: N = ``max_seq_len``, filled with as many documents as fit. False: one row per sequence, N = the
            longest row of the batch rounded up to a multiple of 16 (at most ``max_seq_len``).
        drop_last: True (training): packs that do not fill a global batch are left out of the epoch. False
            (validation): all packs are used; the last micro-batch is filled up with sequences of padding and no
            labels, so that every rank does the same number of forwards.
        shared_by: how many ranks share a sequence; every N is a multiple of it.

    Raises:
        ConfigError: a row longer than ``max_seq_len``, or a batch size below 1.
    """

    def __init__(
        self,
        dataset: TokenisedDataset,
        *,
        batch_size: int,
        dp_rank: int,
        dp_size: int,
        max_seq_len: int,
        packed: bool,
        shuffle: bool,
        seed: int,
        pad_id: int,
        drop_last: bool = True,
        shared_by: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: must be at least 1; give the sequences per rank and pass")
        longest = int(dataset.token_counts.argmax())
        if dataset.token_counts[longest] > max_seq_len:
            raise ConfigError(
                f"row {dataset.row_numbers[longest]} of {dataset.where}: {dataset.token_counts[longest]} tokens, more "
                f"than max_seq_len={max_seq_len}; give dataset and loader the same max_seq_len"
            )
        self.dataset, self.max_seq_len, self.packed = dataset, max_seq_len, packed
        self.shuffle, self.seed, self.pad_id, self.drop_last = shuffle, seed, pad_id, drop_last
        self.batch_size, self.dp_rank, self.dp_size = batch_size, dp_rank, dp_size
        self.width_multiple = _WIDTH_MULTIPLE * shared_by
        self._planned: tuple[int, PackPlan] | None = None
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self.position = epoch, 0

    def steps_per_epoch(self, global_batch: int) -> int:
        """Optimizer steps of ``global_batch`` packs in an epoch; the same for all epochs.

        Raises:
            ConfigError: with ``drop_last``, when the packs do not fill one global batch.
        """
        packs = len(self._plan(0))
        if not self.drop_last:
            return -(-packs // global_batch)
        if packs < global_batch:
            raise ConfigError(
                f"{self.dataset.where}: {packs} sequences, fewer than one global batch of {global_batch}; lower "
                "batch_size or gradient_accumulation_steps (global_batch_size), or give more rows"
            )
        return packs // global_batch

    def next_batch(self) -> Batch:
        """This rank's part of the next global micro-batch, and move the position behind it.

        Raises:
            RuntimeError: the epoch is over (with ``drop_last``: what is left does not fill a micro-batch).
            DataLostError: a file of the dataset vanished or shrank; the position stays.
        """
        micro, packs = self.batch_size * self.dp_size, len(self._plan(self.epoch))
        if self.position + (micro if self.drop_last else 1) > packs:
            raise RuntimeError(f"epoch {self.epoch} is over: {self.position} of {packs} sequences were used")
        batch = self._batch_at(self.position)
        self.position += micro
        return batch

    def epoch_batches(self) -> Iterator[Batch]:
        """All micro-batches of the current epoch from its beginning; the position stays where it is.

        Raises:
            DataLostError: as :meth:`next_batch`.
        """
        micro, packs = self.batch_size * self.dp_size, len(self._plan(self.epoch))
        for position in range(0, packs // micro * micro if self.drop_last else packs, micro):
            yield self._batch_at(position)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ConfigError when the data holds ids that a model of ``vocab_size`` does not know."""
        self.dataset.check_vocabulary(vocab_size)
        if not 0 <= self.pad_id < vocab_size:
            raise ConfigError(f"pad_id={self.pad_id}: outside the model's vocabulary of {vocab_size}; give a valid id")

    def _plan(self, epoch: int) -> PackPlan:
        key = epoch if self.shuffle else 0
        if self._planned is None or self._planned[0] != key:
            counts, packed, shuffle = self.dataset.token_counts, self.packed, self.shuffle
            plan = pack_plan(counts, self.max_seq_len, seed=self.seed, epoch=key, shuffle=shuffle, packed=packed)
            self._planned = (key, plan)
        return self._planned[1]

    def _batch_at(self, position: int) -> Batch:
        plan = self._plan(self.epoch)
        self.dataset.files.check()
        begin = position + self.dp_rank * self.batch_size
        packs = range(begin, begin + self.batch_size)
        return self._batch([plan[pack] if pack < len(plan) else plan.rows[:0] for pack in packs])

    def _batch(self, packs: list[IntArray]) -> Batch:
        counts = [int(self.dataset.token_counts[pack].sum()) for pack in packs]
        rounded = -(-max([*counts, 1]) // self.width_multiple) * self.width_multiple
        width = self.max_seq_len if self.packed else min(rounded, self.max_seq_len)
        tokens = np.full((len(packs), width), self.pad_id, dtype=np.int64)
        labels = np.full((len(packs), width), IGNORE_INDEX, dtype=np.int64)
        input_pos = np.zeros((len(packs), width), dtype=np.int64)
        lengths: list[list[int]] = []
        padding: list[int] = []
        for i, pack in enumerate(packs):
            begin = 0
            lengths.append([])
            for index in pack:
                ids, targets = self.dataset.arrays(int(index))
                end = begin + len(ids)
                tokens[i, begin:end], labels[i, begin:end] = ids, targets
                input_pos[i, begin:end] = np.arange(len(ids))
                lengths[i].append(len(ids))
                begin = end
            padding.append(width - begin)
            if begin < width:
                input_pos[i, begin:] = np.arange(width - begin)
                lengths[i].append(width - begin)
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            input_pos=torch.from_numpy(input_pos),
            lengths=lengths,
            padding=padding,
            row_ids=[int(row) for pack in packs for row in self.dataset.row_numbers[pack]],
            num_input_tokens=sum(counts),
            num_label_tokens=int((labels != IGNORE_INDEX).sum()),
        )

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a position to mean the same packs."""
        return {
            "rows": len(self.dataset),
            "tokens": self.dataset.num_tokens,
            "digest": self.dataset.digest,
            "seed": self.seed,
            "max_seq_len": self.max_seq_len,
            "packed": self.packed,
            "shuffle": self.shuffle,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, equal on all ranks; valid between two optimizer steps."""
        plan = self._plan(self.epoch).checksum()
        return {"epoch": self.epoch, "position": self.position, "plan": plan, **self._identity()}

    def check_state(self, state: dict[str, Any]) -> None:
        """That :meth:`load_state_dict` will find the rows that the position of ``state`` meant.

        Raises:
            ConfigError: it was taken with other data, another seed or other packing, so the position would point to
                other rows.
        """
        for key, here in self._identity().items():
            if state[key] != here:
                what = f"data of dataset {self.dataset.where} ({key})" if key in _SAME_DATA else key
                raise ConfigError(
                    f"resume: the checkpoint has {what} {state[key]}, this run has {here}; restore the earlier data "
                    "and settings, or start without resuming"
                )
        plan = self._plan(state["epoch"]).checksum()
        if plan != state["plan"]:
            raise ConfigError(
                f"resume: the checkpoint has pack plan {state['plan']}, this run computes {plan} from the same data "
                "and seed; use the numpy version of the earlier run, or start without resuming"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken. Raises ConfigError as :meth:`check_state` does."""
        self.check_state(state)
        self.epoch, self.position = state["epoch"], state["position"]
