"""A worker for the tests of the launcher that needs no torch: what it does is written in its arguments.

``RANK=what`` or ``RANK.ATTEMPT=what``: an exit code, ``killed``, ``forever``, ``deaf`` to signals, or ``saving``, which
waits for a signal and ends with 75 after ``seconds=`` (or at a second signal, with 128 + n, unless that comes within
``window=`` seconds).
"""

import os
import signal
import sys
import time

from lrdint_tune.training.interruption import REPEAT_SECONDS

rank = os.environ["RANK"]
plan = dict(argument.split("=") for argument in sys.argv[1:])
what = plan.get(f"{rank}.{os.environ['TORCHELASTIC_RESTART_COUNT']}") or plan[rank]
got: list[float] = []


def tell(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one piece


def handle(number: int, frame: object) -> None:
    if not got:
        got.append(time.monotonic())
    elif time.monotonic() - got[0] > float(plan.get("window", REPEAT_SECONDS)):
        tell(f"at once {rank}")
        os._exit(128 + number)


for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    if what == "saving":
        signal.signal(number, handle)
    elif what == "deaf":
        signal.signal(number, signal.SIG_IGN)
tell(f"started {rank}")
if what == "saving":
    while not got:
        time.sleep(0.02)
    time.sleep(float(plan.get("seconds", "0.3")))
    sys.exit(75)
if what in ("forever", "deaf"):
    time.sleep(600)
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(what))
