"""From the config's ``source``, ``data_files`` and ``split`` to a Hugging Face dataset with columns of text."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.data.files import (
    BAD_ROW,
    Kind,
    OnBadRow,
    Row,
    content_digest,
    read_json,
    read_text,
    resolve_files,
)
from lrdint_tune.training.data.ranks import is_main_process

log = logging.getLogger(__name__)

# Part of the cache key of rows read from local files: raise it when the readers' output changes.
_READER_VERSION = 2


def load_rows(
    source: str,
    *,
    columns: Sequence[str],
    data_files: Any = None,
    name: str | None = None,
    split: str = "train",
    separator: str | None = None,
    num_rows: int | None = None,
    cache_dir: str | None = None,
    kind: Kind = "text",
    on_bad_row: OnBadRow = "error",
) -> datasets.Dataset:
    """Load the rows of one split; the result has (at least) ``columns``.

    Args:
        source: ``json`` or ``text`` for local files, otherwise whatever ``datasets.load_dataset`` takes: a dataset of
            the hub, a local folder, ``csv``, ``parquet``.
        columns: columns of text that are needed.
        data_files: local path(s) or pattern(s); for other sources handed to ``load_dataset``. A hub dataset with many
            splits is downloaded whole unless the files of the one split are named here.
        name: configuration of a hub dataset.
        split: split with an optional slice, such as ``train[:95%]``. Local files have the one split ``train``.
        separator: regular expression between the documents of a text file (``source: text``).
        num_rows: use the first ``num_rows`` rows only.
        kind: what the columns of local JSON files hold; see ``files.read_json``.
        on_bad_row: ``skip``: the result has one more column, ``files.BAD_ROW``, for local files. Rows of other sources
            are not looked at here.
        cache_dir: where to keep the rows and later the tokens; None: the Hugging Face default (``HF_DATASETS_CACHE``).

    Raises:
        ConfigError: naming the key, its value and the fix.
    """
    if separator is not None and source != "text":
        raise ConfigError(f"dataset.document_separator={separator!r}: only for dataset.source=text; remove it")
    if num_rows is not None and num_rows < 1:
        raise ConfigError(f"dataset.num_rows={num_rows}: must be at least 1, or null for all rows")
    if source in ("json", "text"):
        if name is not None and is_main_process():
            log.warning("dataset.name=%r has no effect on local files (dataset.source=%s)", name, source)
        rows = _local(source, resolve_files(data_files, source), columns, separator, cache_dir, kind, on_bad_row)
        rows = _slice(rows, split)
    else:
        rows = _load(source, name=name, data_files=_plain(data_files), split=split, cache_dir=cache_dir)
    if len(rows) == 0:
        raise ConfigError(f"dataset.source={source!r}, dataset.split={split!r}: no rows; give a dataset with rows")
    for column in columns:
        if column not in rows.column_names:
            raise ConfigError(
                f"dataset.source={source!r}: no row has the column {column!r}; the rows have "
                f"{', '.join(map(repr, rows.column_names))}; correct the column names in the config"
            )
    if num_rows is not None and num_rows > len(rows) and is_main_process():
        log.warning("dataset.num_rows=%d has no effect: there are only %d rows", num_rows, len(rows))
    return rows if num_rows is None or num_rows >= len(rows) else rows.select(range(num_rows))


def _local(
    source: str,
    paths: list[str],
    columns: Sequence[str],
    separator: str | None,
    cache_dir: str | None,
    kind: Kind,
    on_bad_row: OnBadRow,
) -> datasets.Dataset:
    # Not load_dataset("json"): it guesses types per block (dates, nulls for missing keys) and cannot say which line
    # is wrong. Tuples, because lists among the arguments of a generator mean shards.
    reader: Callable[..., Iterator[Row]] = read_json
    options: dict[str, Any] = {"columns": tuple(columns), "kind": kind}
    if source == "text":
        reader, options = read_text, {"separator": _checked_separator(separator), "column": columns[0]}
    names = [*columns, BAD_ROW] if on_bad_row == "skip" else columns
    options |= {"digest": content_digest(paths), "version": _READER_VERSION, "on_bad_row": on_bad_row}
    try:
        return datasets.Dataset.from_generator(
            reader,
            features=datasets.Features({column: datasets.Value("string") for column in names}),
            cache_dir=cache_dir,
            gen_kwargs={"paths": tuple(paths), **options},
        )
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        if isinstance(cause, OSError):
            raise cache_error(cause, cache_dir) from error
        raise
    except (OSError, pa.ArrowInvalid) as error:
        raise cache_error(error, cache_dir) from error


def cache_error(error: Exception, folder: str | None) -> ConfigError:
    """For Arrow files that cannot be written (a full disk) or were damaged after they had been."""
    folder = folder or str(datasets.config.HF_DATASETS_CACHE)
    reason = " ".join(str(error).split())
    return ConfigError(
        f"dataset.cache_dir={folder!r}: cannot be written or is damaged ({reason}); make room there, or remove what "
        "is named or the whole folder: it is made again"
    )


def _checked_separator(separator: str | None) -> str | None:
    if separator is None:
        return None
    try:
        pattern = re.compile(separator)
    except re.error as error:
        raise ConfigError(
            f"dataset.document_separator={separator!r}: not a regular expression ({error}); correct it"
        ) from error
    if pattern.groups:
        raise ConfigError(f"dataset.document_separator={separator!r}: has a capturing group; write it as (?:...)")
    return separator


def _slice(rows: datasets.Dataset, split: str) -> datasets.Dataset:
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"dataset.split={split!r}: local files have the one split 'train'; give train, or a slice such as "
            "train[:95%]"
        ) from error
    indices = [index for part in parts for index in range(part.from_ or 0, len(rows) if part.to is None else part.to)]
    return rows if len(parts) == 1 and len(indices) == len(rows) else rows.select(indices)


def _load(source: str, **options: Any) -> datasets.Dataset:
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().exists():
        raise ConfigError(f"dataset.source={source!r}: no such folder; give a dataset folder, or dataset.source=json")
    try:
        rows = datasets.load_dataset(source, **options)
    except Exception as error:  # the hub client raises many unrelated types; every one means "not loadable as asked"
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ConfigError(
            f"dataset.source={source!r}, split={options['split']!r}: cannot be loaded ({type(error).__name__}: "
            f"{reason}); check the names and the network, or use local files: dataset.source=json "
            "dataset.data_files=<path>"
        ) from error
    if not isinstance(rows, datasets.Dataset):
        raise ConfigError(f"dataset.split={options['split']!r}: must name one split, such as train")
    return rows


def _plain(data_files: Any) -> Any:
    """``data_files`` in Python's own containers: config objects would confuse ``load_dataset``."""
    if isinstance(data_files, Mapping):
        return {str(key): _plain(value) for key, value in data_files.items()}
    if data_files is None or isinstance(data_files, str):
        return data_files
    return [str(entry) for entry in data_files]
