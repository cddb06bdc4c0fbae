"""From text to token ids with exact label boundaries, and the cache key of the result."""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import datasets
import numpy as np
from datasets.fingerprint import Hasher

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.data.files import check_text

# Part of the cache key of tokenised rows: raise it when the columns below or their meaning change.
_FORMAT_VERSION = 1
# Rows whose tokens go into the cache key, so that a tokenizer whose code changed is noticed too.
_PROBE_ROWS = 8

TOKEN_FEATURES = datasets.Features(
    {
        "tokens": datasets.Sequence(datasets.Value("int32")),
        # number of leading label positions that are not trained (those that predict a prompt token)
        "untrained": datasets.Value("int32"),
        "max_id": datasets.Value("int32"),
        "crc": datasets.Value("int64"),
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


def _columns(rows: Sequence[tuple[list[int], int]]) -> dict[str, list[Any]]:
    arrays = [np.asarray(ids, dtype=np.int32) for ids, _ in rows]
    return {
        "tokens": arrays,
        "untrained": [untrained for _, untrained in rows],
        "max_id": [int(ids.max(initial=-1)) for ids in arrays],
        "crc": [zlib.crc32(ids.tobytes()) for ids in arrays],
    }


class PromptResponse:
    """Tokenises rows of prompt and response: ``[BOS] prompt response [EOS]``.

    The two texts are tokenised separately, so that every token belongs to one of them and the label mask is exact; at
    the seam the ids may differ from those of the joined text. The model generates from a prompt tokenised the same way.
    """

    def __init__(
        self, encoder: Encoder, columns: tuple[str, str], templates: tuple[str, str], train_on_input: bool, where: str
    ) -> None:
        self.encoder, self.columns, self.templates = encoder, columns, templates
        self.train_on_input, self.where = train_on_input, where

    def options(self) -> dict[str, Any]:
        return {"columns": self.columns, "templates": self.templates, "train_on_input": self.train_on_input}

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = []
        for row, prompt, response in zip(indices, *(batch[column] for column in self.columns), strict=True):
            where = f"row {row} of {self.where}"
            prompt = check_text(prompt, self.columns[0], where)
            response = check_text(response, self.columns[1], where)
            # str.replace, not str.format: templates and texts are full of braces (LaTeX, JSON, code)
            head = self.encoder.prefix + self.encoder.piece(self.templates[0].replace("{prompt}", prompt))
            tail = self.encoder.piece(self.templates[1].replace("{response}", response)) + self.encoder.suffix
            rows.append((head + tail, 0 if self.train_on_input else max(len(head) - 1, 0)))
        return _columns(rows)


class Conversation:
    """Tokenises conversations, rows of ``[{role, content}, ...]``: everything before the last assistant turn is the
    prompt, that turn the response; what follows it is dropped.

    Each turn is ``turn_template`` with its ``{role}`` and ``{content}``; the response is that of an assistant's turn
    from ``{content}`` on.
    """

    def __init__(self, encoder: Encoder, column: str, turn_template: str, where: str) -> None:
        self.encoder, self.column, self.turn_template, self.where = encoder, column, turn_template, where

    def options(self) -> dict[str, Any]:
        return {"column": self.column, "turn_template": self.turn_template}

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = []
        for row, turns in zip(indices, batch[self.column], strict=True):
            where = f"row {row} of {self.where}"
            prompt, response = self._split(turns, where)
            head = self.encoder.prefix + self.encoder.piece(prompt)
            rows.append((head + self.encoder.piece(response) + self.encoder.suffix, max(len(head) - 1, 0)))
        return _columns(rows)

    def _split(self, turns: Any, where: str) -> tuple[str, str]:
        turns = json.loads(turns) if isinstance(turns, str) else turns
        if not isinstance(turns, list) or not all(
            isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns
        ):
            raise ConfigError(
                f"{where}: column {self.column!r} is no list of {{role, content}}; correct or drop the row"
            )
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
        if last is None:
            raise ConfigError(f"{where}: column {self.column!r} has no turn of the assistant; correct or drop the row")
        texts = []
        for turn in turns[: last + 1]:
            content = check_text(turn["content"], self.column, where)
            before, _, after = self.turn_template.partition("{content}")
            texts.append((before.replace("{role}", str(turn["role"])), content + after))
        prompt = "".join(before + rest for before, rest in texts[:-1]) + texts[-1][0]
        return prompt, texts[-1][1]


class Document:
    """Tokenises rows of plain text: ``[BOS] text [EOS]``, every token but the first is trained."""

    def __init__(self, encoder: Encoder, column: str, where: str) -> None:
        self.encoder, self.column, self.where = encoder, column, where

    def options(self) -> dict[str, Any]:
        return {"column": self.column}

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = []
        for row, text in zip(indices, batch[self.column], strict=True):
            ids = self.encoder.piece(check_text(text, self.column, f"row {row} of {self.where}"))
            rows.append((self.encoder.prefix + ids + self.encoder.suffix, 0))
        return _columns(rows)


def tokenise(
    rows: datasets.Dataset, function: PromptResponse | Conversation | Document, num_proc: int | None = None
) -> datasets.Dataset:
    """Tokenise every row into the columns of ``TOKEN_FEATURES``, in Arrow files that are reused by later runs.

    The cache key is explicit, because the default (a hash of the pickled function) misses changes it cannot see: the
    rows' own fingerprint, the tokenizer (class, vocabulary, special ids), the options, and the tokens of the first
    rows, where BOS, EOS and changed code show. Files appear under their final name only when complete, so several
    processes may do this at once.

    Raises:
        ConfigError: a value that is not text, with its row and column.
    """
    return rows.map(
        function,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=TOKEN_FEATURES,
        num_proc=num_proc,
        new_fingerprint=_cache_key(rows, function),
        desc="Tokenising",
    )


def _cache_key(rows: datasets.Dataset, function: PromptResponse | Conversation | Document) -> str:
    encoder, count = function.encoder, min(_PROBE_ROWS, len(rows))
    probe = function(rows[:count], list(range(count)))
    key = {
        "version": _FORMAT_VERSION,
        "rows": rows._fingerprint,
        "tokenizer": [type(encoder.tokenizer).__qualname__, Hasher.hash(encoder.tokenizer)],
        "function": [type(function).__name__, function.options()],
        "probe": [ids.tolist() for ids in probe["tokens"]],
    }
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
