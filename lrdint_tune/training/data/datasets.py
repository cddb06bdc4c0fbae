"""Tokenised datasets: memory-mapped token ids, and the labels of each example made on demand."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, Literal

import datasets as hf_datasets
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.models.loss import IGNORE_INDEX
from lrdint_tune.training.data.encode import Conversation, Document, Encoder, PromptResponse, Tokenizer, tokenise
from lrdint_tune.training.data.files import OnBadRow
from lrdint_tune.training.data.ranks import is_main_process
from lrdint_tune.training.data.sources import load_rows
from lrdint_tune.training.data.watch import WatchedFiles

log = logging.getLogger(__name__)


LongRows = Literal["error", "truncate", "split"]

# How many bad rows the log names.
_REASONS_SHOWN = 5


class TokenisedDataset:
    """Examples of at most ``max_seq_len`` tokens, backed by memory-mapped Arrow files.

    ``dataset[i]`` is ``{"tokens": int64 [n], "labels": int64 [n]}`` with the labels already shifted within the
    document: ``labels[j] = tokens[j + 1]``, and -100 where nothing is trained (positions that predict a prompt token,
    and the last token of a document). Rows without any trained token are left out and counted.

    Attributes:
        token_counts: int64 [len(self)], tokens of each example.
        label_counts: int64 [len(self)], trained tokens of each example, all > 0.
        row_numbers: int64 [len(self)], row of the source each example comes from (counting from 0).
        files: what the rows are read from.
        digest: hexadecimal digest of all tokens and label boundaries; equal data, equal digest.
        truncated, split, unlabelled: numbers of rows that were cut, split, left out.
        bad_rows: number of rows left out because something is wrong with them (``on_bad_row=skip``).

    Args:
        table: dataset with the columns of ``encode.TOKEN_FEATURES``.
        long_rows: what to do with rows of more than ``max_seq_len`` tokens: ``error``; ``truncate`` drops the end;
            ``split`` makes consecutive examples of one document. The last token of an example made by splitting
            still predicts the first of the next one: within one document that is a true label, and none is lost.
        where: names the source in messages.

    Raises:
        ConfigError: a row longer than ``max_seq_len`` (with ``error``), or nothing left to train on.
    """

    def __init__(
        self,
        table: hf_datasets.Dataset,
        *,
        max_seq_len: int,
        long_rows: LongRows = "error",
        where: str = "dataset",
    ) -> None:
        self.where = where
        self.files = WatchedFiles(file["filename"] for file in table.cache_files)
        chunks = table.data.column("tokens").chunks
        # Zero-copy views of the memory map: one flat array of ids and one of offsets per record batch.
        self._ids = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._first_row = np.cumsum([0] + [len(chunk) for chunk in chunks])
        counts = np.concatenate([np.diff(offsets) for offsets in self._offsets]).astype(np.int64)
        bad = table.data.column("bad").drop_null()
        self.bad_rows, self._reasons = len(bad), bad.slice(0, _REASONS_SHOWN).to_pylist()
        if self.bad_rows == len(table):
            raise ConfigError(f"dataset.on_bad_row='skip': {where}: no row is good; the first: {self._reasons[0]}")
        untrained, self._max_ids, crc = (table.data.column(name).to_numpy() for name in ("untrained", "max_id", "crc"))

        long = counts > max_seq_len
        if long.any() and long_rows == "error":
            row = int(np.argmax(long))
            raise ConfigError(
                f"row {row} of {where}: {counts[row]} tokens, more than max_seq_len={max_seq_len} ({int(long.sum())} "
                f"of {len(counts)} rows are longer, the longest has {counts.max()}); raise max_seq_len, remove the "
                "rows, or set dataset.long_rows=truncate"
            )
        self.truncated = int(long.sum()) if long_rows == "truncate" else 0
        self.split = int(long.sum()) if long_rows == "split" else 0

        pieces = np.maximum(-(-counts // max_seq_len), 1) if long_rows == "split" else np.ones_like(counts)
        rows = np.repeat(np.arange(len(counts)), pieces)
        piece = np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = piece * max_seq_len
        lengths = np.minimum(counts[rows] - starts, max_seq_len)
        # Labels of an example are trained in [first, stop) of its positions. The end of a document predicts nothing.
        ends = (starts + lengths == counts[rows]) | (long_rows == "truncate")
        stops = lengths - ends
        firsts = np.maximum(untrained[rows] - starts, 0)
        # Also leaves out a last piece of one token, whose only use was as the label before it.
        kept = np.flatnonzero(stops > firsts)

        self.unlabelled = len(counts) - len(np.unique(rows[kept])) - self.bad_rows
        if len(kept) == 0:
            raise ConfigError(
                f"{where}: none of its {len(counts)} rows has a token to train on; give rows with a response, or raise "
                "max_seq_len"
            )
        self.row_numbers = rows[kept]
        self.token_counts = lengths[kept]
        self.label_counts = (stops - firsts)[kept]
        self._starts, self._firsts, self._stops = starts[kept], firsts[kept], stops[kept]
        self.max_seq_len = max_seq_len
        self.digest = self._digest(crc)
        self._report(len(counts))

    def _digest(self, crc: npt.NDArray[Any]) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for array in (crc[self.row_numbers], self._starts, self.token_counts, self._firsts, self._stops):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()

    def _report(self, rows: int) -> None:
        if not is_main_process():
            return
        log.info("%s: %d examples, %d tokens, %d trained", self.where, len(self), self.num_tokens, self.num_labels)
        if self.truncated:
            log.warning("%s: %d of %d rows truncated to %d tokens", self.where, self.truncated, rows, self.max_seq_len)
        if self.bad_rows:
            log.warning("%s: %d of %d rows are bad and left out; the first:", self.where, self.bad_rows, rows)
            for reason in self._reasons:
                log.warning("  %s", reason)
        if self.unlabelled:
            log.warning("%s: %d of %d rows left out: no token to train on", self.where, self.unlabelled, rows)

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def num_tokens(self) -> int:
        return int(self.token_counts.sum())

    @property
    def num_labels(self) -> int:
        return int(self.label_counts.sum())

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ConfigError when a row holds a token id that a model of ``vocab_size`` does not know."""
        outside = self._max_ids >= vocab_size
        if outside.any():
            row = int(np.argmax(outside))
            raise ConfigError(
                f"row {row} of {self.where}: token id {self._max_ids[row]} is outside the model's vocabulary of "
                f"{vocab_size}; use the tokenizer that belongs to the model"
            )

    def arrays(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(tokens int64 [n], labels int64 [n]) of one example."""
        row, start, length = int(self.row_numbers[index]), int(self._starts[index]), int(self.token_counts[index])
        first, stop = int(self._firsts[index]), int(self._stops[index])
        chunk = int(np.searchsorted(self._first_row, row, side="right")) - 1
        begin = int(self._offsets[chunk][row - self._first_row[chunk]]) + start
        ids = self._ids[chunk]
        labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
        labels[first:stop] = ids[begin + first + 1 : begin + stop + 1]
        return ids[begin : begin + length].astype(np.int64), labels

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        tokens, labels = self.arrays(index)
        return {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}

    def documents(self) -> "Documents":
        """The same examples as the pairs that ``lrdint_tune.evaluation.nll`` takes."""
        return Documents(self)


class Documents(Sequence[tuple[Tensor, Tensor]]):
    """The examples of a dataset as ``(tokens, labels)``, read when they are asked for."""

    def __init__(self, dataset: TokenisedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self._dataset[index]
        return example["tokens"], example["labels"]


def sft_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    prompt_column: str,
    response_column: str,
    max_seq_len: int,
    data_files: Any = None,
    name: str | None = None,
    split: str = "train",
    prompt_template: str = "{prompt}",
    response_template: str = "{response}",
    train_on_input: bool = False,
    add_bos: bool | None = None,
    add_eos: bool = True,
    long_rows: LongRows = "error",
    on_bad_row: OnBadRow = "error",
    num_rows: int | None = None,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> TokenisedDataset:
    """Supervised fine-tuning: rows of a prompt and a response; only the response (and EOS) is trained.

    Prompt and response are tokenised separately (BOS only before the prompt, EOS only after the response), so that the
    label mask is exact: ``[BOS] prompt_template(prompt) response_template(response) [EOS]``.

    Args:
        tokenizer: any torchtune tokenizer, or an object with its ``encode(text, add_bos, add_eos)``.
        source: ``json`` for local files, or what ``datasets.load_dataset`` takes; with ``data_files``, ``name``,
            ``split``, ``num_rows`` and ``cache_dir`` see ``sources.load_rows``.
        prompt_column, response_column: columns of text.
        prompt_template, response_template: text around them; must contain ``{prompt}`` and ``{response}``. Other
            braces stay as they are.
        train_on_input: train the prompt too.
        add_bos: None: as the tokenizer does by itself; see ``encode.Encoder``.
        long_rows: ``error`` or ``truncate``; rows of more than ``max_seq_len`` tokens.
        on_bad_row: ``error``, or ``skip``: rows that cannot be used (invalid JSON, a missing column, something else
            than text, not Unicode, a broken conversation) are left out, counted, and told with file and line. Row
            numbers stay those of the source. Files and datasets with bad rows only are refused all the same.
        num_proc: processes that tokenise; None: this one.

    Raises:
        ConfigError: see ``load_rows``, ``encode`` and ``TokenisedDataset``.
    """
    for key, template in (("prompt", prompt_template), ("response", response_template)):
        if "{" + key + "}" not in template:
            raise ConfigError(f"dataset.{key}_template={template!r}: does not contain {{{key}}}; add it")
    if source == "text":
        raise ConfigError("dataset.source='text': plain text has no prompt and response; use text_dataset")
    _check(max_seq_len, on_bad_row, long_rows, ("error", "truncate"))
    columns = (prompt_column, response_column)
    rows = load_rows(
        source,
        columns=columns,
        data_files=data_files,
        name=name,
        split=split,
        num_rows=num_rows,
        cache_dir=cache_dir,
        on_bad_row=on_bad_row,
    )
    where = _describe(source, data_files, split)
    encoder = Encoder(tokenizer, add_bos, add_eos)
    function = PromptResponse(
        encoder,
        columns,
        where,
        on_bad_row,
        templates=(prompt_template, response_template),
        train_on_input=train_on_input,
    )
    return TokenisedDataset(
        tokenise(rows, function, num_proc),
        max_seq_len=max_seq_len,
        long_rows=long_rows,
        where=where,
    )


def chat_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    max_seq_len: int,
    conversation_column: str = "messages",
    turn_template: str = "<|{role}|>\n{content}\n",
    data_files: Any = None,
    name: str | None = None,
    split: str = "train",
    add_bos: bool | None = None,
    add_eos: bool = True,
    long_rows: LongRows = "error",
    on_bad_row: OnBadRow = "error",
    num_rows: int | None = None,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> TokenisedDataset:
    """Supervised fine-tuning on conversations: of each, the last turn of the assistant (and EOS) is trained.

    Args:
        conversation_column: column of lists of ``{role, content}``.
        turn_template: text around each turn, with ``{role}`` before ``{content}``; the default is Tulu's.

    The other arguments are those of ``sft_dataset``.

    Raises:
        ConfigError: see ``load_rows``, ``encode`` and ``TokenisedDataset``; a row without a turn of the assistant.
    """
    role, content = turn_template.find("{role}"), turn_template.find("{content}")
    if not 0 <= role < content:
        raise ConfigError(f"dataset.turn_template={turn_template!r}: must contain {{role}} and then {{content}}")
    _check(max_seq_len, on_bad_row, long_rows, ("error", "truncate"))
    rows = load_rows(
        source,
        columns=(conversation_column,),
        kind="conversation",
        data_files=data_files,
        name=name,
        split=split,
        num_rows=num_rows,
        cache_dir=cache_dir,
        on_bad_row=on_bad_row,
    )
    where = _describe(source, data_files, split)
    encoder = Encoder(tokenizer, add_bos, add_eos)
    function = Conversation(encoder, (conversation_column,), where, on_bad_row, turn_template=turn_template)
    return TokenisedDataset(
        tokenise(rows, function, num_proc), max_seq_len=max_seq_len, long_rows=long_rows, where=where
    )


def text_dataset(
    tokenizer: Tokenizer,
    *,
    source: str = "text",
    max_seq_len: int,
    column: str = "text",
    data_files: Any = None,
    name: str | None = None,
    split: str = "train",
    document_separator: str | None = None,
    add_bos: bool | None = None,
    add_eos: bool = True,
    long_rows: LongRows = "split",
    on_bad_row: OnBadRow = "error",
    num_rows: int | None = None,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> TokenisedDataset:
    """Plain text: every row (or document of a text file) is ``[BOS] text [EOS]`` and all of it is trained.

    Args:
        source: ``text`` for local text files, ``json`` for local JSON files, or what ``datasets.load_dataset`` takes.
        column: column of text; for text files it only names the column.
        document_separator: regular expression between the documents of a text file; None: a file is one document.
        long_rows: ``split`` (consecutive examples), ``error`` or ``truncate``; see ``TokenisedDataset``. BOS stands
            before the first example of a document only.

    The other arguments are those of ``sft_dataset``.

    Raises:
        ConfigError: see ``load_rows``, ``encode`` and ``TokenisedDataset``.
    """
    _check(max_seq_len, on_bad_row, long_rows, ("split", "error", "truncate"))
    rows = load_rows(
        source,
        columns=(column,),
        data_files=data_files,
        name=name,
        split=split,
        separator=document_separator,
        num_rows=num_rows,
        cache_dir=cache_dir,
        on_bad_row=on_bad_row,
    )
    where = _describe(source, data_files, split)
    return TokenisedDataset(
        tokenise(rows, Document(Encoder(tokenizer, add_bos, add_eos), (column,), where, on_bad_row), num_proc),
        max_seq_len=max_seq_len,
        long_rows=long_rows,
        where=where,
    )


def _check(max_seq_len: int, on_bad_row: str, long_rows: str, choices: tuple[str, ...]) -> None:
    if max_seq_len < 2:
        raise ConfigError(f"max_seq_len={max_seq_len}: must be at least 2, one token and the one it predicts")
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"dataset.on_bad_row={on_bad_row!r}: unknown; give one of error, skip")
    if long_rows not in choices:
        raise ConfigError(f"dataset.long_rows={long_rows!r}: unknown; give one of {', '.join(choices)}")


def _describe(source: str, data_files: Any, split: str) -> str:
    files = "" if data_files is None else f" {str(data_files)!r}"
    return f"{source!r}{files} split {split!r}"
