"""The launch scripts: their syntax, the command they compose, and what Slurm makes of them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from lrdint_tune.launching.options import compose, parse
from lrdint_tune.training.config import TrainConfig
from tests.common.tiny_run import read_losses, write_run
from tests.integration.kill_ranks import REPOSITORY, environment, recorded_step
from tests.integration.slurm import missing, running_slurm

RECIPES = REPOSITORY / "recipes"
SCRIPTS = sorted([*RECIPES.glob("slurm/*.sbatch"), *RECIPES.glob("torchrun/*.sh")])
JOBSET = RECIPES / "kubernetes" / "jobset.yaml"
MEETING = {"NNODES": "2", "RDZV_ENDPOINT": "node1:29500", "NPROC_PER_NODE": "2"}

CHECKED = [*SCRIPTS, RECIPES / "reproduce" / "cluster.sbatch"]  # its dry run: test_reproduce.py

scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: "/".join(script.parts[-2:]))


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) == 4


every_script = pytest.mark.parametrize("script", CHECKED, ids=lambda script: "/".join(script.parts[-2:]))


@every_script
def test_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@every_script
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck(script: Path) -> None:
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def _launch(words: list[str]) -> tuple[Any, list[str]]:
    """The launcher's config, checked by the launcher itself, and the workers' arguments."""
    words = words[words.index("python") :]
    assert words[:3] == ["python", "-m", "lrdint_tune.launch"]
    config, _, arguments = compose(parse(words[3:]))
    assert arguments[:3] == ["-u", "-m", "lrdint_tune.full_finetune_distributed"]
    return config, arguments[3:]


def _dry_run(script: Path, **variables: str) -> list[str]:
    done = subprocess.run(
        ["bash", script, "my config.yaml", "output_dir=/x y"],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", **MEETING, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(done.stdout)


@pytest.fixture(autouse=True)
def no_options_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith("PET_")})


@scripts
def test_dry_run_prints_a_command_that_the_launcher_takes(script: Path) -> None:
    words = _dry_run(script)
    config, arguments = _launch(words)
    assert arguments == ["--config", "my config.yaml", "resume=auto", "output_dir=/x y"]
    assert "resume" in TrainConfig.__dataclass_fields__
    assert (config.nproc_per_node, config.max_restarts) == (2, 3)
    several = script.stem == "multi_node"
    assert (config.min_nodes, config.max_nodes) == ((2, 2) if several else (1, 1))
    assert ("--rdzv_endpoint" in words) == several
    assert (words[0] == "srun") == (script.suffix == ".sbatch")


def test_slurm_job_meets_on_its_first_node(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[3-5]" ] && printf "node3\\nnode4\\nnode5\\n"\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "120345", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "node[3-5]"}
    script = RECIPES / "slurm" / "multi_node.sbatch"
    words = _dry_run(script, **job, PATH=f"{tmp_path}:{os.environ['PATH']}")
    config, _ = _launch(words)
    assert (config.rdzv_endpoint, config.run_id, config.min_nodes) == ("node3:20345", "120345", 3)
    assert "--ntasks=3" in words


@scripts
def test_without_a_config_it_says_how_to_call_it(script: Path) -> None:
    done = subprocess.run(["bash", script], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode != 0
    assert "usage: " in done.stderr


@pytest.mark.parametrize("variable", ["NNODES", "RDZV_ENDPOINT"])
def test_several_machines_must_know_how_to_meet(variable: str) -> None:
    variables = {name: value for name, value in MEETING.items() if name != variable}
    script = RECIPES / "torchrun" / "multi_node.sh"
    done = subprocess.run(
        ["bash", script, "c.yaml"], capture_output=True, text=True, env={"PATH": os.environ["PATH"], **variables}
    )
    assert done.returncode != 0
    assert f"{variable}: set it to" in done.stderr


def test_jobset() -> None:
    jobset = yaml.safe_load(JOBSET.read_text())
    job = jobset["spec"]["replicatedJobs"][0]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    variables = {entry["name"]: entry.get("value", "10.0.0.7") for entry in container["env"]}
    assert (REPOSITORY / variables["CONFIG"]).is_file()
    assert str(spec["parallelism"]) == str(spec["completions"]) == variables["NNODES"]
    # Pod 0 by the name that JobSet gives it.
    name = jobset["metadata"]["name"]
    assert variables["RDZV_ENDPOINT"].startswith(f"{name}-{job['name']}-0-0.{name}:")
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}

    done = subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": os.environ["PATH"], **variables, "NPROC_PER_NODE": "8", "DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    config, arguments = _launch(shlex.split(done.stdout))
    assert arguments == ["--config", variables["CONFIG"], "resume=auto", "output_dir=/data/run"]
    assert (config.min_nodes, config.nproc_per_node, config.local_addr) == (2, 8, "10.0.0.7")
    # The pod has as long for saving as the launcher gives the workers.
    assert pod["terminationGracePeriodSeconds"] == config.shutdown_timeout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with running_slurm(tmp_path_factory.mktemp("slurm")) as variables:
        yield variables


@pytest.mark.slow
@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.suffix == ".sbatch"], ids=lambda s: s.stem)
def test_slurm_would_start_it(slurm: dict[str, str], script: Path) -> None:
    command = ["sbatch", "--test-only", "--partition=cluster", str(script), "config.yaml"]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nodes = "node[1-2]" if script.stem == "multi_node" else "node1"
    assert f"on nodes {nodes} in partition cluster" in done.stderr


@pytest.mark.slow
def test_slurm_job_is_signalled_queued_again_and_finishes(slurm: dict[str, str], tmp_path: Path) -> None:
    config = write_run(tmp_path, max_steps_per_epoch=12, global_batch_size=2, dataset_val__num_rows=4)
    output = tmp_path / "out"
    options = ["--partition=here", "--nodes=1", "--gres=none", "--cpus-per-task=1", f"--output={tmp_path}/job.log"]
    script = str(RECIPES / "slurm" / "multi_node.sbatch")
    variables = {**environment(), **slurm, "PYTHON": sys.executable, "NPROC_PER_NODE": "2", "MAX_RESTARTS": "0"}
    variables["PYTHONPATH"] = str(REPOSITORY)
    command = ["sbatch", "--parsable", *options, script, str(config), f"output_dir={output}"]
    job = subprocess.run(command, env=variables, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    number = job.stdout.strip()
    log = tmp_path / "job.log"
    try:
        _until(lambda: recorded_step(output) >= 4, log)
        subprocess.run(["scancel", "--signal=USR1", number], env=slurm, check=True)
        _until(lambda: "queueing job" in _text(log), log)
        # Its first end, reported late, would count as the second's.
        _until(lambda: _state(number, slurm) == "PENDING" and not _has_steps(number), log)
        time.sleep(5)  # slurmd reports that end when its process is gone
        # Slurm lets a job that is queued again wait for two minutes.
        subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], env=slurm, check=True)
        _until(lambda: _state(number, slurm) in ("COMPLETED", "FAILED"), log)
    finally:
        subprocess.run(["scancel", "--signal=KILL", "--full", number], env=slurm, capture_output=True)
    assert _state(number, slurm) == "COMPLETED", _text(log)
    assert list(read_losses(output)) == list(range(1, 25))


def _until(condition: Any, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, _text(log)
        time.sleep(0.02)


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.is_file() else ""


def _has_steps(job: str) -> bool:
    """Whether Slurm has a process of this job on this machine."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            if file.read_bytes().startswith(f"slurmstepd: [{job}.".encode()):
                return True
    return False


def _state(job: str, slurm: dict[str, str]) -> str:
    done = subprocess.run(["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True)
    return done.stdout.partition("JobState=")[2].split(" ")[0]
