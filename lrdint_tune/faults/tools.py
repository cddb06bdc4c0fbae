"""The system's tools, with errors in one line."""

from __future__ import annotations

import subprocess


class ToolFailed(RuntimeError):
    """A tool is not there, or did not do what it was asked to; the message says which and why."""


def run_tool(*command: str) -> None:
    """Run a command. Raises ToolFailed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise ToolFailed(f"{command[0]} is not installed") from None
    if done.returncode:
        raise ToolFailed(f"{' '.join(command)}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
