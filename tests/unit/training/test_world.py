"""The process group: founded by one process alone, and under torchrun on a store that an earlier attempt has used."""

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.world import end_world, fresh_store, resolve_device, start_world
from tests.distributed.harness import run_ranks, start_ranks

PATIENCE = timedelta(seconds=10)


def _attempt(store: dist.Store, size: int, absent: int | None = None) -> dict[int, str]:
    """What each rank of one attempt reads under a key that every attempt writes on rank 0."""
    read: dict[int, str] = {}
    mark = f"attempt {threading.get_ident()} {len(_attempts)}"
    _attempts.append(mark)

    def run(rank: int) -> None:
        own = fresh_store(store, rank, size, PATIENCE)
        if rank == 0:
            assert not own.check(["address"]), "the store is not fresh"
            own.set("address", mark)
        own.wait(["address"], PATIENCE)
        read[rank] = own.get("address").decode()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in reversed(range(size)) if rank != absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read.values()) == {mark}
    return read


_attempts: list[str] = []


def test_attempts_do_not_see_each_other() -> None:
    store = dist.HashStore()
    for _ in range(3):
        assert len(_attempt(store, 3)) == 3


def test_questions_of_dead_processes_do_no_harm() -> None:
    """Ranks that asked and died before rank 0 was there."""
    store = dist.HashStore()
    for rank in (1, 2):
        store.set(f"question/{rank}", "nobody")
    assert len(_attempt(store, 3)) == 3


def test_missing_rank_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"ranks \[1\] of 2"):
        fresh_store(dist.HashStore(), 0, 2, timedelta(seconds=0.1))


def _alone() -> tuple[int, int, str, tuple[int, ...]]:
    world = start_world("cpu", replicate=1, shard=-1)
    assert world.on_main(lambda: 2.5) == 2.5
    assert world.is_main
    end_world()
    assert not dist.is_initialized()
    return world.rank, world.size, world.device.type, world.mesh.mesh.shape


def test_one_process_without_a_launcher() -> None:
    assert start_ranks(_alone, 1, group=False).results == [(0, 1, "cpu", (1, 1, 1))]


def _refused() -> str:
    raise ConfigError("no such thing")


def _two(replicate: int) -> tuple[str, str, tuple[int, ...]]:
    world = start_world("cpu", replicate=replicate, shard=-1)
    chosen = world.on_main(lambda: f"by rank {world.rank}")
    try:
        world.on_main(_refused)
    except ConfigError as error:  # on every rank, though only rank 0 ran it
        return chosen, str(error), tuple(world.mesh.mesh.shape)
    return chosen, "not refused", tuple(world.mesh.mesh.shape)


def test_mesh_of_two_and_what_rank_0_does_for_all() -> None:
    assert run_ranks(_two, 2, 1) == [("by rank 0", "no such thing", (1, 2, 1))] * 2
    assert run_ranks(_two, 2, 2) == [("by rank 0", "no such thing", (2, 1, 1))] * 2


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="device='cuda': torch sees no CUDA device; set device=cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == torch.device("cuda", 3)
    assert resolve_device("cpu").type == "cpu"
