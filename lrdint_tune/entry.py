"""What every entry point does: read the config, set up the log, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune.config._utils import _merge_yaml_and_cli_args
from tqdm import tqdm

from lrdint_tune.ending import is_main, report
from lrdint_tune.errors import ConfigError, ReportedError

Main = Callable[[DictConfig], int]


def recipe(
    *, log_level: int = logging.INFO, at_end: Callable[[], None] | None = None
) -> Callable[[Main], Callable[[], NoReturn]]:
    """Make a function of the config the command ``--config FILE key=value ...``, which ends the process with the
    function's result, or with the ``exit_code`` of a :class:`~lrdint_tune.errors.ReportedError` and one line.

    It stands where ``torchtune.config.parse`` would, whose errors are tracebacks.

    Args:
        log_level: of the first process; the others tell warnings only.
        at_end: called last, however the function ended.
    """

    def decorate(main: Main) -> Callable[[], NoReturn]:
        @functools.wraps(main)
        def command() -> NoReturn:
            # Before anything is parsed: libraries must not set up a log of their own.
            level = log_level if is_main() else logging.WARNING
            logging.basicConfig(level=level, format="%(message)s", handlers=[_AboveTheBar(sys.stderr)], force=True)
            try:
                code = main(read_config(sys.argv[1:], main.__doc__))
            except ReportedError as error:
                report(error)
                code = error.exit_code
            finally:
                if at_end is not None:
                    at_end()
            sys.exit(code)

        return command

    return decorate


class _AboveTheBar(logging.StreamHandler):
    """Each message on a line of its own, also while a progress bar is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except (OSError, ValueError):  # nobody reads it any more: no reason to end a run
            self.handleError(record)


def read_config(arguments: Sequence[str], description: str | None = None) -> DictConfig:
    """The YAML file behind ``--config`` with the overrides merged in: ``key=value``, ``~key`` removes.

    Raises:
        ConfigError: the file cannot be read, is no mapping of keys, or an argument is neither.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a YAML file; key=value after it overrides its keys")
    known, overrides = parser.parse_known_args(arguments)
    for argument in overrides:
        if argument.startswith("-"):
            raise ConfigError(f"{argument}: unknown option; give keys of the config as key=value")
        if argument.count("=") > 1:
            raise ConfigError(f"{argument}: has more than one =; write such a value into the config file")
        if not argument.startswith("~") and argument.find("=") < 1:
            raise ConfigError(f"{argument}: is no override; give key=value, or ~key to remove a key")
    if known.config is None:
        raise ConfigError("--config: missing; give a YAML file, such as --config configs/quickstart.yaml")
    values = _read_yaml(known.config)
    for override in overrides:
        values = _overridden(values, override)
    return OmegaConf.create(values)


def _overridden(values: dict[str, Any], override: str) -> dict[str, Any]:
    """One at a time, so that the message names the one that is wrong."""
    try:
        merged = OmegaConf.to_container(_merge_yaml_and_cli_args(Namespace(**values), [override]), resolve=False)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override}: not valid YAML after the = ({_one_line(error)}); correct or quote it") from None
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        if override.startswith("~"):
            reason = "no such key in the file, or a section with a _component_, which can be replaced only"
        else:
            reason = str(error).splitlines()[0]
        raise ConfigError(f"{override}: {reason}; correct the override") from None
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; give --config FILE, and keys of the config as key=value")


def _read_yaml(path: str) -> dict[str, Any]:
    """The file's keys. Raises ConfigError for whatever else it holds."""
    try:
        loaded = OmegaConf.load(path)  # its YAML loader also refuses a key that is given twice
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        # OmegaConf's own OSError, without a number, is for a file that holds a single value.
        reason = getattr(error, "strerror", None) or (
            "not UTF-8" if isinstance(error, UnicodeDecodeError) else "holds a single value, no keys"
        )
        raise ConfigError(f"--config {path}: cannot be read ({reason}); give a YAML file of keys") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML ({_one_line(error)}); correct the file") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"--config {path}: {str(error).splitlines()[0]}; correct the file") from None
    except RecursionError:
        raise ConfigError(f"--config {path}: is nested without end; correct the file") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"--config {path}: holds a list; write the keys without a dash before them")
    if not loaded:
        raise ConfigError(f"--config {path}: is empty; start from a file of configs/")
    values = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _one_line(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return where + (problem or str(error).splitlines()[0])
