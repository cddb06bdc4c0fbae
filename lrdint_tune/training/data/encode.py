"""From text to token ids with exact label boundaries, and the cache key of the result."""

import hashlib
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.data.files import BAD_ROW, OnBadRow, check_conversation, check_text
from lrdint_tune.training.data.sources import cache_error

# Part of the cache key of tokenised rows: raise it when the columns below or their meaning change.
_FORMAT_VERSION = 2
# Rows whose tokens go into the cache key, so that a tokenizer whose code changed is noticed too.
_PROBE_ROWS = 8

TOKEN_FEATURES = datasets.Features(
    {
        "tokens": datasets.Sequence(datasets.Value("int32")),
        # number of leading label positions that are not trained (those that predict a prompt token)
        "untrained": datasets.Value("int32"),
        "max_id": datasets.Value("int32"),
        "crc": datasets.Value("int64"),
        # why a row was left out (on_bad_row=skip), otherwise null; such a row has no tokens
        "bad": datasets.Value("string"),
    }
)


class Tokenizer(Protocol):
    """What is needed of a tokenizer; every torchtune tokenizer has it. ``bos_id`` and ``eos_id`` are optional."""

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> list[int]: ...


class Encoder:
    """Tokenises pieces of a document and adds BOS before the first and EOS after the last, exactly once each.

    Args:
        add_bos: None: as the tokenizer does by itself, that is what ``tokenizer.json`` says for Hugging Face
            tokenizers, otherwise True when there is a BOS id.

    Raises:
        ConfigError: BOS or EOS asked for, and the tokenizer has none.
    """

    def __init__(self, tokenizer: Tokenizer, add_bos: bool | None, add_eos: bool) -> None:
        self.tokenizer = tokenizer
        bos, eos = _special_id(tokenizer, "bos_id"), _special_id(tokenizer, "eos_id")
        # Some tokenizer.json files add BOS or EOS to every text, whatever add_bos says: wrong inside a document.
        probe = tokenizer.encode("a", add_bos=False, add_eos=False)
        self.forced_bos = bos is not None and bool(probe) and probe[0] == bos
        self.forced_eos = eos is not None and bool(probe) and probe[-1] == eos
        if add_bos is None:
            add_bos = bool(getattr(tokenizer, "hf_adds_bos", True)) and bos is not None
        self.prefix = [_required(bos, "add_bos")] if add_bos else []
        self.suffix = [_required(eos, "add_eos")] if add_eos else []

    def piece(self, text: str) -> list[int]:
        """Token ids of ``text`` alone, without BOS and EOS."""
        ids = self.tokenizer.encode(text, add_bos=False, add_eos=False)
        return ids[int(self.forced_bos) : len(ids) - int(self.forced_eos)]


def _special_id(tokenizer: Tokenizer, name: str) -> int | None:
    value = getattr(tokenizer, name, None)
    return None if value is None or value < 0 else int(value)  # SentencePiece writes "none" as -1


def _required(special: int | None, option: str) -> int:
    if special is None:
        raise ConfigError(f"dataset.{option}=true: the tokenizer has no such token; set dataset.{option}=false")
    return special


class RowEncoder(ABC):
    """Tokenises rows, each into its token ids and the number of its leading labels that are not trained.

    Args:
        columns: columns of the rows that are needed.
        where: names the source in messages.
        on_bad_row: ``error``, or ``skip``: a row with something wrong in it has no tokens, and the reason in ``bad``.
    """

    def __init__(self, encoder: Encoder, columns: tuple[str, ...], where: str, on_bad_row: OnBadRow) -> None:
        self.encoder, self.columns, self.where, self.on_bad_row = encoder, columns, where, on_bad_row

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What the tokens depend on beside the columns' texts, as JSON values."""

    @abstractmethod
    def encode(self, values: Sequence[Any], where: str) -> tuple[list[int], int]:
        """(token ids, untrained) of the row with these ``values`` of the columns. Raises ConfigError for a bad row."""

    def key(self) -> list[Any]:
        """Of the cache."""
        return [type(self).__name__, self.columns, self.on_bad_row, self.options()]

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """A batch of rows with their numbers into the columns of ``TOKEN_FEATURES``."""
        rows = []
        # What the reader of local files found wrong; the rows of other sources come as they are.
        known = batch[BAD_ROW] if BAD_ROW in batch else [None] * len(indices)
        for row, bad, *values in zip(indices, known, *(batch[column] for column in self.columns), strict=True):
            ids: list[int] = []
            untrained = 0
            if bad is None:
                try:
                    ids, untrained = self.encode(values, f"row {row} of {self.where}")
                except ConfigError as error:
                    if self.on_bad_row == "error":
                        raise
                    bad = str(error)
            rows.append((np.asarray(ids, dtype=np.int32), untrained, bad))
        return {
            "tokens": [ids for ids, _, _ in rows],
            "untrained": [untrained for _, untrained, _ in rows],
            "max_id": [int(ids.max(initial=-1)) for ids, _, _ in rows],
            "crc": [zlib.crc32(ids.tobytes()) for ids, _, _ in rows],
            "bad": [bad for _, _, bad in rows],
        }


class PromptResponse(RowEncoder):
    """Tokenises rows of prompt and response: ``[BOS] prompt response [EOS]``.

    The two texts are tokenised separately, so that every token belongs to one of them and the label mask is exact; at
    the seam the ids may differ from those of the joined text. The model generates from a prompt tokenised the same way.
    """

    def __init__(self, *source: Any, templates: tuple[str, str], train_on_input: bool) -> None:
        super().__init__(*source)
        self.templates, self.train_on_input = templates, train_on_input

    def options(self) -> dict[str, Any]:
        return {"templates": self.templates, "train_on_input": self.train_on_input}

    def encode(self, values: Sequence[Any], where: str) -> tuple[list[int], int]:
        prompt, response = (
            check_text(value, column, where) for column, value in zip(self.columns, values, strict=True)
        )
        # str.replace, not str.format: templates and texts are full of braces (LaTeX, JSON, code)
        head = self.encoder.prefix + self.encoder.piece(self.templates[0].replace("{prompt}", prompt))
        tail = self.encoder.piece(self.templates[1].replace("{response}", response)) + self.encoder.suffix
        return head + tail, 0 if self.train_on_input else max(len(head) - 1, 0)


class Conversation(RowEncoder):
    """Tokenises conversations, rows of ``[{role, content}, ...]``: everything before the last assistant turn is the
    prompt, that turn the response; what follows it is dropped.

    Each turn is ``turn_template`` with its ``{role}`` and ``{content}``; the response is that of an assistant's turn
    from ``{content}`` on.
    """

    def __init__(self, *source: Any, turn_template: str) -> None:
        super().__init__(*source)
        self.turn_template = turn_template

    def options(self) -> dict[str, Any]:
        return {"turn_template": self.turn_template}

    def encode(self, values: Sequence[Any], where: str) -> tuple[list[int], int]:
        (turns,) = values
        if isinstance(turns, str):
            try:
                turns = json.loads(turns)
            except ValueError:
                pass  # text that is no conversation
        last = check_conversation(turns, self.columns[0], where)
        before, _, after = self.turn_template.partition("{content}")
        texts = [(before.replace("{role}", turn["role"]), turn["content"] + after) for turn in turns[: last + 1]]
        prompt = "".join(head + rest for head, rest in texts[:-1]) + texts[-1][0]
        head = self.encoder.prefix + self.encoder.piece(prompt)
        return head + self.encoder.piece(texts[-1][1]) + self.encoder.suffix, max(len(head) - 1, 0)


class Document(RowEncoder):
    """Tokenises rows of plain text: ``[BOS] text [EOS]``, every token but the first is trained."""

    def options(self) -> dict[str, Any]:
        return {}

    def encode(self, values: Sequence[Any], where: str) -> tuple[list[int], int]:
        ids = self.encoder.piece(check_text(values[0], self.columns[0], where))
        return self.encoder.prefix + ids + self.encoder.suffix, 0


def tokenise(rows: datasets.Dataset, function: RowEncoder, num_proc: int | None = None) -> datasets.Dataset:
    """Tokenise every row into the columns of ``TOKEN_FEATURES``, in Arrow files that are reused by later runs.

    The cache key is explicit, because the default (a hash of the pickled function) misses changes it cannot see: the
    rows' own fingerprint, the tokenizer (class, vocabulary, special ids), the options, and the tokens of the first
    rows, where BOS, EOS and changed code show. Files appear under their final name only when complete, so several
    processes may do this at once.

    Raises:
        ConfigError: a bad row, with its number and column, unless ``function`` skips it; Arrow files that cannot be
            written or are damaged.
    """
    try:
        table = rows.map(
            function,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=TOKEN_FEATURES,
            num_proc=num_proc,
            new_fingerprint=_cache_key(rows, function),
            desc="Tokenising",
        )
    except (OSError, pa.ArrowInvalid) as error:
        raise cache_error(error, _folder(rows)) from error
    if len(table) != len(rows):  # cut off between two of its blocks
        raise cache_error(ValueError(f"{len(table)} of {len(rows)} rows in {table.cache_files}"), _folder(rows))
    return table


def _folder(rows: datasets.Dataset) -> str | None:
    return str(Path(rows.cache_files[0]["filename"]).parent) if rows.cache_files else None


def _cache_key(rows: datasets.Dataset, function: RowEncoder) -> str:
    encoder, count = function.encoder, min(_PROBE_ROWS, len(rows))
    probe = function(rows[:count], list(range(count)))
    key = {
        "version": _FORMAT_VERSION,
        "rows": rows._fingerprint,
        "tokenizer": [type(encoder.tokenizer).__qualname__, Hasher.hash(encoder.tokenizer)],
        "function": function.key(),
        "probe": [ids.tolist() for ids in probe["tokens"]],
    }
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
