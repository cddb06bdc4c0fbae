"""main_process_first: order, failures, and a run without a process group. Two real processes over gloo."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lrdint_tune.training.data import main_process_first

RANK = """
import json, os, sys, time
from pathlib import Path
import torch.distributed as dist
from lrdint_tune.errors import ConfigError
from lrdint_tune.training.data import BatchLoader, main_process_first, sft_dataset
from tests.unit.data.byte_tokenizer import ByteTokenizer

folder, good, bad = sys.argv[1:]
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

entered = []
def load(path):
    with main_process_first():
        entered.append(time.monotonic())
        data = sft_dataset(ByteTokenizer(), source="json", data_files=path, prompt_column="q", response_column="a",
                           max_seq_len=32, cache_dir=f"{folder}/cache")
        if rank == 0:
            time.sleep(0.2)
        entered.append(time.monotonic())
    return data

data = load(good)
try:
    load(bad)
    failure = None
except ConfigError as error:
    failure = str(error)
dist.barrier()  # nobody is left behind

# Together, without taking turns: every rank writes, nobody reads half a file.
folder2 = Path(folder) / "cache2"
both = sft_dataset(ByteTokenizer(), source="json", data_files=good, prompt_column="q", response_column="a",
                   max_seq_len=32, cache_dir=str(folder2))
loader = BatchLoader(data, batch_size=2, dp_rank=rank, dp_size=2, max_seq_len=32, packed=False, shuffle=True, seed=0,
                     pad_id=0)
rows = [batch.row_ids for batch in loader.epoch_batches()]
found = dict(entered=entered, failure=failure, digest=[data.digest, both.digest], rows=rows, state=loader.state_dict())
Path(folder, f"{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_prepare_in_turn_and_fail_together(tmp_path: Path, jsonl: Callable[..., str]) -> None:
    good = jsonl([{"q": str(i), "a": "x"} for i in range(1200)])
    bad = jsonl([{"q": "1"}], "bad.jsonl")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), good, bad],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))

    assert first["entered"][1] <= second["entered"][0]  # the second began when the first had finished
    assert first["failure"] == second["failure"] and "no column 'a'" in first["failure"]
    assert len({*first["digest"], *second["digest"]}) == 1
    assert first["state"] == second["state"]
    rows = [row for batch in first["rows"] + second["rows"] for row in batch]
    assert sorted(rows) == list(range(1200))
    # One set of files: the second rank tokenised nothing of its own.
    assert len(list((tmp_path / "cache").rglob("cache-*.arrow"))) == 1
    assert not [file for file in (tmp_path / "cache2").rglob("tmp*") if file.is_file()]


def test_without_a_process_group_the_body_just_runs() -> None:
    with main_process_first():
        ran = True
    assert ran
