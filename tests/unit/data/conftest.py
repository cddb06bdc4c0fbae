import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrdint_tune.training.data import TokenisedDataset, sft_dataset
from tests.unit.data.byte_tokenizer import ByteTokenizer

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hugging Face's caches inside the test's own folder, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(rows: Rows, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def build(jsonl: Callable[..., str]) -> Callable[..., TokenisedDataset]:
    """An SFT dataset with columns q and a, from rows given as dicts or as (prompt, response) pairs."""

    def make(rows: Any, tokenizer: Any = None, **options: Any) -> TokenisedDataset:
        pairs = [row if isinstance(row, dict) else {"q": row[0], "a": row[1]} for row in rows]
        return sft_dataset(
            tokenizer or ByteTokenizer(),
            **{
                "source": "json",
                "data_files": jsonl(pairs),
                "prompt_column": "q",
                "response_column": "a",
                "max_seq_len": 64,
                **options,
            },
        )

    return make
