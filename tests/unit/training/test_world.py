"""The process group: founded by one process alone, and under torchrun on a store that an earlier attempt has used."""

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lrdint_tune.errors import ConfigError, UnreachableError
from lrdint_tune.exit_codes import LOST_RANK
from lrdint_tune.training.rendezvous import fresh_store
from lrdint_tune.training.world import end_world, resolve_device, start_world
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
    with pytest.raises(UnreachableError, match="1 of 3 processes did not come .*: rank 2; here are rank 0 on .* and"):
        _attempt_without(2)


def test_missing_rank_is_named_to_the_others_too() -> None:
    told: list[str] = []

    def other(store: dist.Store) -> None:
        try:
            fresh_store(store, 1, 3, PATIENCE)
        except UnreachableError as error:
            told.append(str(error))

    with pytest.raises(UnreachableError) as error:
        _attempt_without(2, other)
    assert told == [str(error.value)]


def test_rank_0_missing_is_named() -> None:
    with pytest.raises(UnreachableError, match="rank 0 of 2 did not come to .* in 0 s, .*seen from rank 1"):
        fresh_store(dist.HashStore(), 1, 2, timedelta(seconds=0.1))


def _attempt_without(absent: int, other: Callable[[dist.Store], object] | None = None) -> None:
    """Ranks 0 and 1 of three come."""
    store = dist.HashStore()
    thread = threading.Thread(target=other or (lambda s: _refusing(s, absent)), args=(store,))
    thread.start()
    try:
        fresh_store(store, 0, 3, timedelta(seconds=0.5))
    finally:
        thread.join()


def _refusing(store: dist.Store, absent: int) -> None:
    with pytest.raises(UnreachableError, match=f"rank {absent};"):
        fresh_store(store, 1, 3, PATIENCE)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"MASTER_PORT": ""}, ConfigError, "MASTER_PORT='': must be a number when RANK is set"),
        ({"MASTER_ADDR": ""}, ConfigError, "MASTER_ADDR: not set, but RANK is"),
        ({"RANK": "2"}, ConfigError, "RANK=2: must be less than WORLD_SIZE=2"),
        ({"RANK": "1"}, UnreachableError, "rank 1 of 2 finds nobody there .*Connection refused, for 0 s"),
        ({"RANK": "1", "MASTER_ADDR": "nosuch.invalid"}, UnreachableError, "nosuch.invalid:[0-9]+: rank 1 of 2"),
        ({"RANK": "0"}, UnreachableError, "1 of 2 processes did not come to 127.0.0.1:[0-9]+ in 0 s: rank 1; here are"),
    ],
)
def test_processes_that_do_not_meet(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], error: type[Exception], message: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **changed}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(error, match=message):
        start_world("cpu", replicate=1, shard=-1, init_timeout_seconds=0.4)


def test_port_of_rank_0_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**environment, "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UnreachableError, match="rank 0 cannot listen there"):
            start_world("cpu", replicate=1, shard=-1, init_timeout_seconds=0.4)


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


def _silent(device: torch.device) -> None:
    """Rank 0 waits for an answer, as in NCCL's connecting without any limit; rank 1 does not come."""
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.all_reduce(torch.zeros(1))


def _start_silent() -> None:
    start_world("cpu", _silent, replicate=1, shard=-1, init_timeout_seconds=1)


def test_the_first_messages_have_a_time_limit() -> None:
    outcome = start_ranks(_start_silent, 2, timeout=30, grace=10)
    assert outcome.codes == [LOST_RANK, LOST_RANK]
    assert [line for line in outcome.lines if line] == outcome.errors
    assert "but rank 0 on" in outcome.errors[0] and "(no answer in 1 s); set GLOO_SOCKET_IFNAME" in outcome.errors[0]
    assert outcome.outputs[1] == ""


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="device='cuda': torch sees no CUDA device; set device=cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == torch.device("cuda", 3)
    assert resolve_device("cpu").type == "cpu"
