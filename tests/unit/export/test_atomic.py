"""A save that dies, at any moment, leaves the folder that was there before."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lrdint_tune.export import adapter, atomic, hf_folder, save_hf_folder
from lrdint_tune.export.atomic import atomic_folder
from lrdint_tune.export.safetensors_file import SafetensorsFile
from lrdint_tune.models.decoder import is_new_tensor
from lrdint_tune.models.hf import iter_hf_folder
from tests.common.folders import assert_equal_states, random_model, save_tensors


@pytest.fixture(params=["exchange", "two renames"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As it is, and one that cannot exchange two names."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    return str(request.param)


def test_new_folder_replaces_the_old_one_whole(tmp_path: Path, file_system: str) -> None:
    for version in ("first", "second"):
        with atomic_folder(tmp_path / "deep" / "folder") as folder:
            (folder / version).write_text(version)
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text(version)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["folder"]
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == ["second", "sub"]
    assert (tmp_path / "deep" / "folder" / "sub" / "file").read_text() == "second"


def test_linked_folder_stays_linked(tmp_path: Path, file_system: str) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_text() == "new"


def test_file_system_of_the_tests_can_exchange_names(tmp_path: Path) -> None:
    """Otherwise the tests above would all take the fallback."""
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    (a / "of a").touch()
    if not atomic._exchange(a, b):
        pytest.skip("this file system cannot exchange two names")
    assert (b / "of a").exists() and not list(a.iterdir())


@pytest.mark.parametrize("kind", ["hf", "adapter"])
@pytest.mark.parametrize("fail_at", ["tensor", "config", "flush", "rename"])
def test_failed_save_leaves_the_old_folder(
    tmp_path: Path, kind: str, fail_at: str, monkeypatch: pytest.MonkeyPatch, file_system: str
) -> None:
    def save(value: float) -> None:
        model = random_model("dint")
        state = {name: torch.full_like(t, value) for name, t in model.state_dict().items()}
        if kind == "hf":
            save_hf_folder(tmp_path / "out", state.items(), model.spec, dtype=torch.float32, max_shard_bytes=6000)
        else:
            new = {name: t for name, t in state.items() if is_new_tensor(name)}
            save_tensors(tmp_path / "out", new, model.spec)

    save(1.0)
    before = _content(tmp_path / "out")
    targets: dict[str, tuple[Any, str]] = {
        "tensor": (SafetensorsFile, "write"),
        "config": (hf_folder if kind == "hf" else adapter, "write_json"),
        "flush": (atomic.os, "fsync"),
        "rename": (atomic, "replace_folder"),
    }
    target, name = targets[fail_at]

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(target, name, fail)
        with pytest.raises(OSError, match="No space left"):
            save(2.0)
    assert _content(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    save(2.0)
    assert _content(tmp_path / "out") != before


def test_old_folder_survives_a_death_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("old")
    replace = os.replace

    def die_after_the_first(source: Path, target: Path) -> None:
        replace(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", die_after_the_first)
        with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("new")
    assert (tmp_path / ".out.previous" / "file").read_text() == "old"
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def _save_for_ever(folder: Path, replaced: Any) -> None:
    model = random_model("dint")
    version = 0.0
    while True:
        version += 1.0
        state = {name: torch.full_like(t, version) for name, t in model.state_dict().items()}
        save_hf_folder(folder, state.items(), model.spec, dtype=torch.float32, max_shard_bytes=6000)
        if version >= 2:
            replaced.set()


def test_killed_process_leaves_one_whole_version(tmp_path: Path) -> None:
    spec = random_model("dint").spec
    context = multiprocessing.get_context("fork")
    moment = random.Random(0)
    for _ in range(6):
        replaced = context.Event()
        process = context.Process(target=_save_for_ever, args=(tmp_path / "out", replaced), daemon=True)
        start = time.monotonic()
        process.start()
        assert replaced.wait(60)
        time.sleep(moment.uniform(0, (time.monotonic() - start) / 2))  # at some moment of one of the next saves
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        state = dict(iter_hf_folder(tmp_path / "out", spec))
        values = {float(v) for t in state.values() for v in (t.min(), t.max())}
        assert len(values) == 1, "tensors of two saves in one folder"
        assert values.pop() >= 2
    model = random_model("dint")
    save_hf_folder(tmp_path / "out", model.state_dict().items(), spec, dtype=torch.float32)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert_equal_states(dict(iter_hf_folder(tmp_path / "out", spec)), model.state_dict())


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
