"""Texts with one label each, for sequence classification."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.data.encode import Encoder, Tokenizer
from lrdint_tune.training.data.files import check_text
from lrdint_tune.training.data.sources import load_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledTexts:
    """Token ids and the class of each row; ``where`` names the source in messages."""

    tokens: list[list[int]]
    labels: list[int]
    where: str

    def check(self, *, vocab_size: int, num_labels: int) -> None:
        """Raise ConfigError for a token id or a label that the model does not know."""
        for row, (ids, label) in enumerate(zip(self.tokens, self.labels, strict=True)):
            if max(ids, default=0) >= vocab_size:
                raise ConfigError(
                    f"row {row} of {self.where}: token id {max(ids)} is outside the vocabulary of {vocab_size}; use "
                    "the model's tokenizer"
                )
            if not 0 <= label < num_labels:
                raise ConfigError(
                    f"row {row} of {self.where}: label {label} is outside the model's {num_labels} classes; set "
                    "model.num_labels, or drop the row"
                )


def classification_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    text_column: str,
    label_column: str,
    max_seq_len: int,
    data_files: Any = None,
    name: str | None = None,
    split: str = "train",
    add_bos: bool | None = None,
    add_eos: bool = True,
    num_rows: int | None = None,
    cache_dir: str | None = None,
) -> LabelledTexts:
    """Rows of a text and a class: ``[BOS] text [EOS]``, the text cut to ``max_seq_len`` tokens in all.

    Args:
        tokenizer: any torchtune tokenizer.
        text_column: of text.
        label_column: of integers, counting from 0.

    The other arguments are those of ``lrdint_tune.training.data.text_dataset``.

    Raises:
        ConfigError: see ``load_rows``; a text or label of another type.
    """
    rows = load_rows(
        source,
        columns=(text_column, label_column),
        data_files=data_files,
        name=name,
        split=split,
        num_rows=num_rows,
        cache_dir=cache_dir,
        kind="json",
    )
    where = f"{source!r} split {split!r}"
    encoder = Encoder(tokenizer, add_bos, add_eos)
    room = max_seq_len - len(encoder.prefix) - len(encoder.suffix)
    tokens, labels, cut = [], [], 0
    for i, (text, label) in enumerate(zip(rows[text_column], rows[label_column], strict=True)):
        if source == "json":
            text, label = json.loads(text), json.loads(label)
        if isinstance(label, bool) or not isinstance(label, int):
            raise ConfigError(f"row {i} of {where}: column {label_column!r} holds {label!r}; expected an integer")
        ids = encoder.piece(check_text(text, text_column, f"row {i} of {where}"))
        cut += len(ids) > room
        tokens.append(encoder.prefix + ids[:room] + encoder.suffix)
        labels.append(label)
    log.info("%s: %d rows, %d of them cut to %d tokens", where, len(tokens), cut, max_seq_len)
    return LabelledTexts(tokens, labels, where)


@dataclass(frozen=True)
class LabelledBatch:
    """``tokens`` int64 ``[B, N]``, padded on the right; ``mask`` int64 ``[B, N]``, 0 on padding; ``labels`` int64
    ``[B]``; ``row_ids`` rows of the source."""

    tokens: Tensor
    mask: Tensor
    labels: Tensor
    row_ids: list[int]


class LabelledLoader:
    """Batches of :class:`LabelledTexts`, with the methods of :class:`~lrdint_tune.training.data.BatchLoader`.

    Args:
        drop_last: leave out what does not fill a batch (training).
    """

    def __init__(
        self, dataset: LabelledTexts, *, batch_size: int, shuffle: bool, seed: int, pad_id: int, drop_last: bool
    ) -> None:
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.pad_id, self.drop_last = pad_id, drop_last
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        order = torch.arange(len(self.dataset.tokens))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed + epoch))
        self._order, self._position = order.tolist(), 0

    def steps_per_epoch(self, global_batch: int) -> int:
        """Optimizer steps of ``global_batch`` rows. Raises ConfigError when the rows do not fill one."""
        rows = len(self.dataset.tokens)
        if rows < global_batch:
            raise ConfigError(
                f"{self.dataset.where}: {rows} rows, fewer than one global batch of {global_batch}; lower batch_size"
            )
        return rows // global_batch

    def next_batch(self) -> LabelledBatch:
        """The next batch of the epoch."""
        rows = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        return self._batch(rows)

    def epoch_batches(self) -> Iterator[LabelledBatch]:
        """All batches of the current epoch from its beginning; the position stays where it is."""
        end = len(self._order)
        end -= end % self.batch_size if self.drop_last else 0
        for begin in range(0, end, self.batch_size):
            yield self._batch(self._order[begin : begin + self.batch_size])

    def _batch(self, rows: list[int]) -> LabelledBatch:
        ids = [torch.tensor(self.dataset.tokens[row]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return LabelledBatch(
            tokens=pad(ids, batch_first=True, padding_value=self.pad_id),
            mask=pad([torch.ones_like(row) for row in ids], batch_first=True),
            labels=torch.tensor([self.dataset.labels[row] for row in rows]),
            row_ids=rows,
        )
