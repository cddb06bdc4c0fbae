"""Errors that end a run on purpose, as opposed to "the program is wrong"."""

from typing import ClassVar

from lrdint_tune import exit_codes


class ReportedError(Exception):
    """The message is one line that names what is wrong and what to do. Entry points print it as ``error: <message>``
    without a traceback and exit with ``exit_code``."""

    exit_code: ClassVar[int]


class ConfigError(ReportedError, ValueError):
    """Bad input from the user: a config key, a file or a data row.

    The message is one line that names the key (or file), its value and the fix.
    """

    exit_code = exit_codes.BAD_INPUT


class DataLostError(ReportedError):
    """A file of the data vanished, shrank or cannot be read any more while training; the message names it."""

    exit_code = exit_codes.DATA_LOST


class NotSavedError(ReportedError):
    """The last checkpoint or the results could not be written, what was saved before stands; the message says why."""

    exit_code = exit_codes.NOT_SAVED


class UnreachableError(ReportedError):
    """Processes that did not come, cannot talk to each other or do not come to an end; the message names them."""

    exit_code = exit_codes.LOST_RANK
