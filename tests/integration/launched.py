"""A worker for the tests of the launcher that needs no torch: what it does is written in its arguments.

``RANK=what`` or ``RANK.ATTEMPT=what``: an exit code, ``killed``, ``forever``, or ``saving``, which waits for a signal
and ends with 75 after ``seconds=`` (or at the second signal, with 128 + n).
"""

import os
import signal
import sys
import time

rank = os.environ["RANK"]
plan = dict(argument.split("=") for argument in sys.argv[1:])
what = plan.get(f"{rank}.{os.environ['TORCHELASTIC_RESTART_COUNT']}") or plan[rank]
if what == "saving":
    got: list[int] = []

    def handle(number: int, frame: object) -> None:
        if got:
            os._exit(128 + number)
        got.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, handle)
print(f"started {rank}", flush=True)
if what == "saving":
    while not got:
        time.sleep(0.02)
    time.sleep(float(plan.get("seconds", "0.3")))
    sys.exit(75)
if what == "forever":
    time.sleep(600)
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(what))
