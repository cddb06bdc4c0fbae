"""A Slurm of this machine's own for a test: munge, controller and node daemon from Debian's packages, in a folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
# A job that is queued again waits for its old credential to expire: two minutes, here two seconds.
# `here` is this machine; the nodes of `cluster` exist on paper, for --test-only.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=2
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SchedulerParameters=requeue_delay=1,sched_interval=1,batch_sched_delay=0
GresTypes=gpu
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=3600
SuspendExcNodes={host}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
NodeName=node[1-4] NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000 Gres=gpu:8 State=CLOUD
PartitionName=here Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=cluster Nodes=node[1-4] MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no Slurm can be started here; None if it can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "the daemons need root"


@contextmanager
def running_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons; gives the environment in which sbatch and its like find them. They end with the context."""
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    text = CONFIG.format(folder=folder, host=host, ports=_free_ports(2), cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
    (folder / "gres.conf").write_text("")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "--force", "--foreground", f"--socket={folder}/munge.sock", f"--key-file={key}"]
    munge += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    with ExitStack() as stack:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            log = stack.enter_context(open(folder / f"{command[0]}.out", "wb"))
            daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            _wait_for_daemon(command[0], folder, environment)
        yield environment


def _wait_for_daemon(name: str, folder: Path, environment: dict[str, str]) -> None:
    ready = {
        "munged": lambda: (folder / "munge.sock").exists(),
        "slurmctld": lambda: _answers(["sinfo"], environment) is not None,
        "slurmd": lambda: "idle" in (_answers(["sinfo", "-h", "-p", "here", "-o", "%T"], environment) or ""),
    }[name]
    end = time.monotonic() + 30
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(f"{name} did not come up: {(folder / f'{name}.out').read_text()[-2000:]}")
        time.sleep(0.1)


def _answers(command: list[str], environment: dict[str, str]) -> str | None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
