"""Local JSON and text files as rows of text, with errors that name the file and the line."""

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, cast

from lrdint_tune.errors import ConfigError

Row = dict[str, str | None]
Kind = Literal["text", "json", "conversation"]
OnBadRow = Literal["error", "skip"]

# The column with what is wrong with a row that on_bad_row=skip leaves out.
BAD_ROW = "__bad_row__"


def resolve_files(data_files: Any, source: str) -> list[str]:
    """Paths of ``dataset.data_files``: a path, a glob pattern, or a list of them, in a fixed order.

    Raises:
        ConfigError: no files given, a file that does not exist, or a pattern that matches nothing.
    """
    if not data_files or isinstance(data_files, Mapping):
        raise ConfigError(
            f"dataset.data_files={data_files!r}: dataset.source={source!r} reads local files; give a path, a glob "
            "pattern or a list of them"
        )
    paths: list[str] = []
    for entry in [data_files] if isinstance(data_files, str | Path) else data_files:
        pattern = str(Path(str(entry)).expanduser())
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        files = [match for match in matches if Path(match).is_file()]
        if not files:
            what = "is a directory" if Path(pattern).is_dir() else "no such file"
            kind = "JSON or JSONL" if source == "json" else "text"
            raise ConfigError(f"dataset.data_files={str(entry)!r}: {what}; give the path of a {kind} file")
        paths.extend(files)
    return paths


def _open(path: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.endswith(".gz") else open(path, "rb")


def content_digest(paths: Iterable[str]) -> str:
    """Digest of the files' bytes. Time stamps would let an edit within their resolution go unnoticed."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(str(Path(path).stat().st_size).encode())
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise ConfigError(f"dataset.data_files={path!r}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def read_json(
    paths: Sequence[str], columns: Sequence[str], kind: Kind = "text", on_bad_row: OnBadRow = "error", **_: Any
) -> Iterator[Row]:
    """Yield the ``columns`` of every row of JSON files: one object per line, or one array of objects.

    Files may be gzip-compressed (``.gz``). Other columns are ignored and may differ between rows. Keyword arguments
    beyond these belong to the cache key only.

    Args:
        kind: what the columns hold: ``text``; ``json`` (anything, which comes as JSON text); ``conversation`` (lists of
            ``{role, content}`` with a turn of the assistant, as JSON text).
        on_bad_row: ``skip``: a row with something wrong in it comes as empty texts and the reason in ``BAD_ROW``, which
            is None for the others.

    Raises:
        ConfigError: unreadable file or broken array; no rows at all; with ``error`` an invalid line (file and line), a
            row without a needed column (with the columns it has), or one of another kind; with ``skip`` a file that
            has bad rows only. Rows count from 0 over all files.
    """
    number = 0
    for path in paths:
        good = bad = 0
        reason = ""
        for line, parse in _json_records(path):
            where = f"row {number} ({line}{path!r})"
            number += 1
            try:
                row: Row = _columns(parse(), columns, where, kind)
                good += 1
            except ConfigError as error:
                if on_bad_row == "error":
                    raise
                bad, reason = bad + 1, reason or str(error)
                yield {**dict.fromkeys(columns, ""), BAD_ROW: str(error)}
                continue
            yield row if on_bad_row == "error" else {**row, BAD_ROW: None}
        if bad and not good:
            raise _all_bad(path, bad, reason)
    if not number:
        raise _no_rows(paths)


def _json_records(path: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(text that leads to the record inside the file, function that returns it) for every record of a file."""
    try:
        with _open(path) as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            if first == b"[":
                yield from (("", partial(_same, record)) for record in _parse(file.read(), path, 1))
            else:
                for line, content in enumerate(file, start=1):
                    if not content.isspace():
                        # Without its end: an object that goes on below is an error of this line.
                        yield f"line {line} of ", partial(_parse, content.rstrip(), path, line)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"dataset.data_files={path!r}: cannot be read ({error})") from error


def _same(record: Any) -> Any:
    return record


def _parse(content: bytes, path: str, first_line: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg}, column {error.colno}"
    except UnicodeDecodeError as error:
        line, reason = first_line + content[: error.start].count(b"\n"), f"not UTF-8: {error.reason}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
        line, reason = first_line, str(error)
    raise ConfigError(
        f"dataset.data_files={path!r}: line {line} is not valid JSON ({reason}); write one object per line, or one "
        "array of objects"
    )


def _columns(record: Any, columns: Sequence[str], where: str, kind: Kind) -> Row:
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: holds a {type(record).__name__}; expected an object with {_names(columns)}")
    row: Row = {}
    for column in columns:
        if column not in record:
            raise ConfigError(f"{where}: no column {column!r}; it has {_names(record)}; correct the row or the config")
        if kind == "conversation":
            check_conversation(record[column], column, where)
        row[column] = check_text(record[column], column, where) if kind == "text" else json.dumps(record[column])
    return row


def check_conversation(turns: Any, column: str, where: str) -> int:
    """The number of the last turn of the assistant in ``[{role, content}, ...]``.

    Raises:
        ConfigError: it is something else, has no such turn, or a content up to it is not text.
    """
    if not isinstance(turns, list) or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns):
        raise ConfigError(f"{where}: column {column!r} is no list of {{role, content}}; correct or drop the row")
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise ConfigError(f"{where}: column {column!r} has no turn of the assistant; correct or drop the row")
    for turn in turns[: last + 1]:
        check_text(turn["role"], column, where)
        check_text(turn["content"], column, where)
    return last


def check_text(value: Any, column: str, where: str) -> str:
    """``value`` if it is text that can be stored as UTF-8, otherwise a ConfigError that names the row and column."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise ConfigError(f"{where}: column {column!r} holds {kind}; expected text; correct or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: column {column!r} is not Unicode ({error.reason}); correct the row") from error
    return value


def _names(columns: Iterable[str]) -> str:
    return ", ".join(repr(column) for column in columns) or "no columns"


def read_text(
    paths: Sequence[str], separator: str | None, column: str, on_bad_row: OnBadRow = "error", **_: Any
) -> Iterator[Row]:
    """Yield ``{column: document}`` for every non-blank document of UTF-8 text files.

    Args:
        separator: regular expression between two documents of a file; None: every file is one document.
        on_bad_row: as for :func:`read_json`; a bad row is a document with bytes that are no UTF-8.

    Raises:
        ConfigError: a file that cannot be read; no documents at all; with ``error`` a document that is not UTF-8 (file
            and line); with ``skip`` a file without another one.
    """
    empty = True
    for path in paths:
        try:
            with _open(path) as file:
                # Bytes that are no UTF-8 become surrogates, which no other text holds.
                text = file.read().decode(errors="surrogateescape")
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"dataset.data_files={path!r}: cannot be read ({error})") from error
        good = bad = 0
        reason = ""
        for start, document in _documents(text, separator):
            if not document.strip():
                continue
            empty = False
            try:
                document.encode()
                good += 1
            except UnicodeEncodeError as error:
                line = text.count("\n", 0, start + error.start) + 1
                message = f"dataset.data_files={path!r}: line {line} is not UTF-8; convert the file"
                if on_bad_row == "error":
                    raise ConfigError(message) from None
                bad, reason = bad + 1, reason or message
                yield {column: "", BAD_ROW: message}
                continue
            yield {column: document} if on_bad_row == "error" else {column: document, BAD_ROW: None}
        if bad and not good:
            raise _all_bad(path, bad, reason)
    if empty:
        raise _no_rows(paths)


def _documents(text: str, separator: str | None) -> Iterator[tuple[int, str]]:
    """(where it begins, document) for what stands between the matches of ``separator``."""
    begin = 0
    for match in re.finditer(separator, text) if separator is not None else ():
        yield begin, text[begin : match.start()]
        begin = match.end()
    yield begin, text[begin:]


def _no_rows(paths: Sequence[str]) -> ConfigError:
    return ConfigError(f"dataset.data_files={', '.join(map(repr, paths))}: no rows; give files with rows")


def _all_bad(path: str, count: int, first: str) -> ConfigError:
    rows = "its only row is bad" if count == 1 else f"all of its {count} rows are bad, the first"
    return ConfigError(f"dataset.on_bad_row='skip': {path!r}: {rows}: {first}")
