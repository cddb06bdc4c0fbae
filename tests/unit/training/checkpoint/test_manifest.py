"""Size and digest of every file, and of the manifest itself."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.checkpoint.manifest import (
    STATE_FILE,
    DamagedCheckpoint,
    damage,
    digest_of,
    read_manifest,
    write_manifest,
)

STATE = {"step": 7, "run": {"method": "dint", "lr": 1e-3}, "loader": {"position": 12, "digest": "ab"}, "none": None}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name, content in (("a", b"x" * 3_000_000), ("b", b"short")):
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, STATE, {name: digest_of(tmp_path / name) for name in ("a", "b")})
    return tmp_path


def flip(file: Path, position: int) -> None:
    """Change one bit."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_round_trip(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert {key: manifest[key] for key in STATE} == STATE
    assert {name: size for name, (size, _) in manifest["files"].items()} == {"a": 3_000_000, "b": 5}
    assert [damage(checkpoint, name, *entry) for name, entry in manifest["files"].items()] == [None, None]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), "a is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:1234]), "a has 1,234 of 3,000,000 bytes"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "a has 3,000,001 of 3,000,000 bytes"),
        (lambda file: flip(file, 2_999_999), "a: its content differs from what was written"),
    ],
    ids=["missing", "truncated", "longer", "one bit"],
)
def test_damage_is_named(checkpoint: Path, harm: Callable[[Path], object], message: str) -> None:
    entry = read_manifest(checkpoint)["files"]["a"]
    harm(checkpoint / "a")
    found = damage(checkpoint, "a", *entry)
    assert found is not None and found.what.startswith(message) and found.missing == ("missing" in message)


def test_every_bit_of_the_manifest_counts(checkpoint: Path) -> None:
    file = checkpoint / STATE_FILE
    whole = file.read_bytes()
    blanks = 0
    for position in range(len(whole)):
        flip(file, position)
        try:
            read_manifest(checkpoint)
            blanks += 1
            assert json.loads(file.read_bytes()) == json.loads(whole), "another content was accepted"
        except (DamagedCheckpoint, ConfigError) as error:  # the key "digest" itself: as from before there were any
            assert STATE_FILE in str(error) or "without digests" in str(error)
        file.write_bytes(whole)
    assert blanks < 5, "only white space may differ"


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"digest": 3}', "{", "\x00"])
def test_other_content_is_no_manifest(checkpoint: Path, content: str) -> None:
    (checkpoint / STATE_FILE).write_text(content)
    with pytest.raises(DamagedCheckpoint, match=STATE_FILE):
        read_manifest(checkpoint)


def test_missing_manifest(checkpoint: Path) -> None:
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        read_manifest(checkpoint)
