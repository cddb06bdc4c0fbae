"""Reading the command line: every wrong file or argument is one line and exit code 2, for every entry point."""

from __future__ import annotations

import importlib
import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from lrdint_tune.entry import _AboveTheBar, read_config, recipe
from lrdint_tune.errors import ConfigError
from lrdint_tune.exit_codes import BAD_INPUT, NONFINITE
from lrdint_tune.training.nonfinite import NonFiniteLossError

GOOD = "a: 1\nmodel: {_component_: some.model, rank: 3}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def root_logger() -> Any:
    """``recipe`` sets up the root logger."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"a": 1, "model": {"_component_": "some.model", "rank": 3}}),
        (
            ["a=2", "model.rank=4", "b.c=x"],
            {"a": 2, "model": {"_component_": "some.model", "rank": 4}, "b": {"c": "x"}},
        ),
        (["model=other.model"], {"a": 1, "model": {"_component_": "other.model", "rank": 3}}),
        (["~model.rank", "a=None"], {"a": None, "model": {"_component_": "some.model"}}),
        (["~a"], {"model": {"_component_": "some.model", "rank": 3}}),
        (["a=${model.rank}"], {"a": 3, "model": {"_component_": "some.model", "rank": 3}}),
    ],
    ids=str,
)
def test_overrides(file: Path, overrides: list[str], expected: dict[str, Any]) -> None:
    assert read_config(["--config", str(file), *overrides]) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("- a\n- b\n", "holds a list; write the keys without a dash"),
        ("3\n", "holds a single value, no keys"),
        ("", "is empty; start from a file of configs/"),
        ("# nothing\n", "is empty"),
        ("a: 1\na: 2\n", "line 2, column 1: found duplicate key a"),
        ("a: {b: 1, b: 2}\n", "found duplicate key b"),
        ("a: [1\nb: 2\n", "not valid YAML (line 2, column 2: "),
        ("a:\n\tb: 1\n", "not valid YAML (line 2, column 1: "),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("a: &x\n  b: *x\n", "recursive"),
        ("a: \0\n", "control characters"),
        (b"a: \xff\n", "not UTF-8"),
        ("a: ${oops\n", "'${oops'"),
        ("a: !!set {b}\n", "'set'"),
        ("null: 3\n", "NoneType"),
        ("a: !!python/object/apply:os.mkdir [made]\n", "could not determine a constructor"),
    ],
    ids=str,
)
def test_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        read_config(["--config", str(path)])
    message = str(error.value)
    assert message.startswith(f"--config {path}: ") and reason in message and "\n" not in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config: missing; give a YAML file, such as --config configs/quickstart.yaml"),
        (["a=1"], "--config: missing"),
        (["--config"], "argument --config: expected one argument; give --config FILE"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file; give the path"),
        (["--config", "."], "--config .: cannot be read (Is a directory)"),
        (
            ["--config", "FILE", "--batch_size", "3"],
            "--batch_size: unknown option; give keys of the config as key=value",
        ),
        (["--config", "FILE", "-v"], "-v: unknown option"),
        (["--config", "FILE", "--conf", "x"], "--conf: unknown option"),
        (["--config", "FILE", "word"], "word: is no override; give key=value"),
        (["--config", "FILE", "=3"], "=3: is no override"),
        (["--config", "FILE", "a=1", "b=c=d"], "b=c=d: has more than one =; write such a value into the config file"),
        (["--config", "FILE", "a=1", "b=[1"], "b=[1: not valid YAML after the ="),
        (["--config", "FILE", "a=!!python/name:os.system"], "a=!!python/name:os.system: not valid YAML after the ="),
        (["--config", "FILE", "a=${"], "a=${: "),
        (["--config", "FILE", "~b"], "~b: no such key in the file"),
        (["--config", "FILE", "~model.rank.x"], "~model.rank.x: no such key in the file"),
        (["--config", "FILE", "~model"], "~model: no such key in the file, or a section with a _component_"),
    ],
    ids=str,
)
def test_wrong_arguments(file: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config([str(file) if argument == "FILE" else argument for argument in arguments])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["full_finetune_distributed", "plan", "finetune_transformers"])
@pytest.mark.parametrize("content", ["- a\n", "a: 1\na: 2\n"], ids=["list", "duplicate"])
def test_every_entry_point(
    name: str,
    content: str,
    file: Path,
    root_logger: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file.write_text(content)
    monkeypatch.setattr(sys, "argv", [name, "--config", str(file)])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"lrdint_tune.{name}").recipe_main()
    assert ended.value.code == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --config {file}: ")


@pytest.mark.parametrize(("rank", "local_rank", "told"), [("0", "0", True), ("8", "0", True), ("1", "1", False)])
def test_codes_and_who_tells(
    rank: str,
    local_rank: str,
    told: bool,
    file: Path,
    root_logger: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["name", "--config", str(file)])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    ended_with = []
    waits: list[float] = []
    monkeypatch.setattr("lrdint_tune.ending.time.sleep", waits.append)

    @recipe(at_end=lambda: ended_with.append(capsys.readouterr().err))
    def nonfinite(cfg: DictConfig) -> int:
        raise NonFiniteLossError(f"a is {cfg.a}")

    with pytest.raises(SystemExit) as ended:
        nonfinite()
    assert ended.value.code == NONFINITE
    assert ended_with == ["error: a is 1\n" if told else ""]  # told before anything is taken down
    assert waits == ([] if told else [1.0])  # and before the launcher hears of another rank


def test_a_log_that_nobody_reads_ends_nothing() -> None:
    stream = io.StringIO()
    handler = _AboveTheBar(stream)
    stream.close()
    handler.handle(logging.makeLogRecord({"msg": "lost"}))


def test_a_bug_keeps_its_traceback(file: Path, root_logger: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["name", "--config", str(file)])

    @recipe()
    def broken(cfg: DictConfig) -> int:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        broken()


def test_help(monkeypatch: pytest.MonkeyPatch, root_logger: None, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["name", "--help"])

    @recipe()
    def documented(cfg: DictConfig) -> int:
        """What it does."""
        return 0

    with pytest.raises(SystemExit) as ended:
        documented()
    assert ended.value.code == 0
    assert "What it does." in capsys.readouterr().out
