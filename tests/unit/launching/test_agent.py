"""Which worker's end is believed, and how ends are told."""

import socket
from signal import SIGTERM
from types import SimpleNamespace
from typing import cast

import pytest

from lrdint_tune.launching.agent import Agent, describe, root_cause, shell_code
from lrdint_tune.launching.run import after_signal


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ({0: 6, 1: -9}, (1, -9)),  # one that was killed did not choose to end
        ({0: 1, 1: 3}, (1, 3)),  # a code with a meaning before a crash
        ({2: 75, 0: 75, 1: 75}, (0, 75)),
        ({0: 0, 1: 75}, (1, 75)),  # rank 0 was done
        ({0: 0, 1: 0}, (0, 0)),
        ({3: 1}, (3, 1)),
    ],
)
def test_root_cause(codes: dict[int, int], cause: tuple[int, int]) -> None:
    assert root_cause(codes) == cause


def test_shell_code() -> None:
    assert [shell_code(code) for code in (0, 75, -9, -15)] == [0, 75, 137, 143]


def test_lines_are_few_and_name_everybody() -> None:
    host = socket.gethostname()
    codes = {0: -15, 1: 3, 2: -15, 3: -15, 4: 6, 5: 0, 6: -9}
    assert describe(codes, by_themselves=[1, 6]) == [
        f"rank 6 on {host}: killed by SIGKILL",
        f"rank 1 on {host}: exit code 3",
        f"ranks 0, 2, 3 on {host}: stopped, because of the others",
        f"rank 4 on {host}: exit code 6, after the others",
    ]
    everybody = dict.fromkeys(range(8), 75)
    assert describe(everybody, by_themselves=everybody) == [f"ranks 0-7 on {host}: exit code 75"]


@pytest.mark.parametrize(("codes", "code"), [({0: 75, 1: 75}, 75), ({0: 75, 1: 143}, 143), ({0: -9, 1: 75}, 143)])
def test_second_signal_after_all_have_saved_changes_nothing(codes: dict[int, int], code: int) -> None:
    agent = cast(Agent, SimpleNamespace(forced=SIGTERM, stopped=codes))
    assert after_signal(agent, SIGTERM) == code
