"""Models and data of the small experiments, made from public files; what is there already is left as it is."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.export import save_hf_folder
from lrdint_tune.export.atomic import atomic_text
from lrdint_tune.faults.tiny_run import STORIES, write_model
from lrdint_tune.quickstart.prepare import is_complete, prepare_model
from lrdint_tune.reproduce.stories260k import MODEL_FILE, TOKENIZER_FILE, stories260k

LETTERS = "abcdefgh"
HELD_OUT = 0.1  # of a book, its end


def prepare(kind: str, data_dir: Path | None, folder: Path) -> None:
    """Put what the preset ``kind`` needs into ``folder``.

    Args:
        kind: ``stories260k``, ``smollm2_135m``, ``letters``, or ``none`` for a preset that names its own files.
        data_dir: where the public files lie (see recipes/reproduce/README.md).
        folder: made if it does not exist.

    Raises:
        ConfigError: a file is missing from ``data_dir``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind != "none":
        _KINDS[kind](data_dir, folder)


def _stories260k(data_dir: Path | None, folder: Path) -> None:
    """The model as a Hugging Face folder with its tokenizer; the Wizard of Oz cut in two; some of its home stories."""
    model = folder / "model"
    if not (model / "config.json").is_file():
        source = data_dir or Path()
        _file(data_dir, MODEL_FILE)
        loaded = stories260k(source)
        save_hf_folder(model, loaded.state_dict().items(), loaded.spec, dtype=torch.float32)
        shutil.copyfile(_file(data_dir, TOKENIZER_FILE), model / "tok512.model")
    if not (folder / "heldout.txt").is_file():
        book = _file(data_dir, "text/wizard_of_oz.txt").read_text(encoding="utf-8")
        cut = book.index("\n", int(len(book) * (1 - HELD_OUT)))
        atomic_text(folder / "train.txt", book[:cut])
        atomic_text(folder / "heldout.txt", book[cut:])
    if not (folder / "tiny_stories.txt").is_file():
        atomic_text(folder / "tiny_stories.txt", _file(data_dir, "text/tiny_stories.txt").read_text(encoding="utf-8"))


def _smollm2_135m(data_dir: Path | None, folder: Path) -> None:
    """The model as ``make quickstart`` gets it; GSM8K as it is, and as plain text; LAMBADA."""
    if not is_complete(folder / "model"):
        prepare_model(folder / "model", folder / "downloads", "auto")
    for split, name in (("train", "train"), ("test", "heldout")):
        if (folder / f"{name}_text.jsonl").is_file():
            continue
        rows = _rows(_file(data_dir, f"gsm8k/{split}.jsonl"))
        atomic_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        texts = [{"text": f"Question: {row['question']}\nAnswer: {row['answer']}"} for row in rows]
        atomic_text(folder / f"{name}_text.jsonl", "".join(json.dumps(row) + "\n" for row in texts))
    if not (folder / "lambada.jsonl").is_file():
        rows = _rows(_file(data_dir, "eval/lambada_openai.jsonl"))
        rows = [{"context": row["context"], "continuation": " " + row["continuation"]} for row in rows]
        atomic_text(folder / "lambada.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _letters(data_dir: Path | None, folder: Path) -> None:
    """Independent, equally likely letters, one token each: nothing before a token tells anything about it, so no
    language model gets below ``ln 8`` nats; and a random Llama of stories260K's shape."""
    if not (folder / "model" / "config.json").is_file():
        write_model(folder / "model", **STORIES)
    for split, documents in (("train", 16_000), ("heldout", 400)):
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            generator = random.Random(f"letters {split}")
            texts = ("".join(generator.choices(LETTERS, k=512)) for _ in range(documents))
            atomic_text(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))


_KINDS: dict[str, Callable[[Path | None, Path], None]] = {
    "stories260k": _stories260k,
    "smollm2_135m": _smollm2_135m,
    "letters": _letters,
}


def _file(data_dir: Path | None, name: str) -> Path:
    if data_dir is None:
        raise ConfigError(f"--data_dir: missing; give the folder that holds {name} (recipes/reproduce/README.md)")
    if not (data_dir / name).is_file():
        raise ConfigError(f"--data_dir {data_dir}: has no {name}; recipes/reproduce/README.md says where it is from")
    return data_dir / name


def _rows(file: Path) -> list[Any]:
    """Those of a JSONL file, whose strings may hold any separator but a newline."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
