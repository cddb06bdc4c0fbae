"""Local JSON and text files as rows of text, with errors that name the file and the line."""

import glob
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from lrdint_tune.errors import ConfigError

Row = dict[str, str]


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


def read_json(paths: Sequence[str], columns: Sequence[str], as_json: bool = False, **_: Any) -> Iterator[Row]:
    """Yield the text ``columns`` of every row of JSON files: one object per line, or one array of objects.

    With ``as_json`` a column may hold anything, and its JSON is the text. Files may be gzip-compressed (``.gz``). Other
    columns are ignored and may differ between rows. Keyword arguments beyond these belong to the cache key only.

    Raises:
        ConfigError: unreadable file or invalid JSON (file and line), no rows at all, a row without a needed
            column (with the columns it has), or a column that is not text. Rows count from 0 over all files.
    """
    number = 0
    for path in paths:
        for line, record in _json_records(path):
            where = f"row {number} ({line}{path!r})"
            yield _text_columns(record, columns, where, as_json)
            number += 1
    if not number:
        raise _no_rows(paths)


def _json_records(path: str) -> Iterator[tuple[str, Any]]:
    """(text that leads to the record inside the file, record) for every record of a file."""
    try:
        with _open(path) as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            if first == b"[":
                yield from (("", record) for record in _parse(file.read(), path, 1))
            else:
                for line, content in enumerate(file, start=1):
                    if not content.isspace():
                        # Without its end: an object that goes on below is an error of this line.
                        yield f"line {line} of ", _parse(content.rstrip(), path, line)
    except (OSError, EOFError) as error:
        raise ConfigError(f"dataset.data_files={path!r}: cannot be read ({error})") from error


def _parse(content: bytes, path: str, first_line: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg}, column {error.colno}"
    except UnicodeDecodeError as error:
        line, reason = first_line + content[: error.start].count(b"\n"), f"not UTF-8: {error.reason}"
    raise ConfigError(
        f"dataset.data_files={path!r}: line {line} is not valid JSON ({reason}); write one object per line, or one "
        "array of objects"
    )


def _text_columns(record: Any, columns: Sequence[str], where: str, as_json: bool) -> Row:
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: holds a {type(record).__name__}; expected an object with {_names(columns)}")
    row = {}
    for column in columns:
        if column not in record:
            raise ConfigError(f"{where}: no column {column!r}; it has {_names(record)}; correct the row or the config")
        row[column] = json.dumps(record[column]) if as_json else check_text(record[column], column, where)
    return row


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


def read_text(paths: Sequence[str], separator: str | None, column: str, **_: Any) -> Iterator[Row]:
    """Yield ``{column: document}`` for every non-blank document of UTF-8 text files.

    Args:
        separator: regular expression between two documents of a file; None: every file is one document.

    Raises:
        ConfigError: a file that cannot be read or is not UTF-8 (file and line), or no documents at all.
    """
    empty = True
    for path in paths:
        try:
            with _open(path) as file:
                content = file.read()
        except (OSError, EOFError) as error:
            raise ConfigError(f"dataset.data_files={path!r}: cannot be read ({error})") from error
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise ConfigError(f"dataset.data_files={path!r}: line {line} is not UTF-8; convert the file") from error
        for document in [text] if separator is None else re.split(separator, text):
            if document.strip():
                empty = False
                yield {column: document}
    if empty:
        raise _no_rows(paths)


def _no_rows(paths: Sequence[str]) -> ConfigError:
    return ConfigError(f"dataset.data_files={', '.join(map(repr, paths))}: no rows; give files with rows")
