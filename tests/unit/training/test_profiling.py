"""What is handed to torch.profiler where there is CUDA; traces of real runs are in tests/integration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity

from lrdint_tune.errors import ConfigError
from lrdint_tune.training import profiling
from lrdint_tune.training.profiling import ProfilerWindow
from lrdint_tune.training.world import World

CPU, CUDA = ProfilerActivity.CPU, ProfilerActivity.CUDA


def window(device: str, **section: Any) -> ProfilerWindow:
    world = World(rank=3, size=4, device=torch.device(device), mesh=cast(DeviceMesh, None))
    return ProfilerWindow({"enabled": True, **section}, Path("logs"), world, total_steps=100)


@pytest.mark.parametrize(
    ("section", "expected"),
    [({}, [CPU, CUDA]), ({"cuda": False}, [CPU]), ({"cpu": False}, [CUDA]), ({"cuda": True}, [CPU, CUDA])],
    ids=str,
)
def test_activities(section: dict[str, Any], expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Profile:
        def __init__(self, **options: Any) -> None:
            given.update(options)

        def start(self) -> None:
            given["started"] = True

    monkeypatch.setattr(profiling, "profile", Profile)
    window("cuda", **section).start(100)
    assert given["activities"] == expected
    assert given["started"]


def test_nothing_to_record_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="profiler.cpu=false: nothing else can be recorded on a CPU; set it to true"):
        window("cpu", cpu=False)


def test_a_section_that_is_off_is_not_held_against_the_run() -> None:
    """Only its own values: one config serves both devices."""
    window("cpu", enabled=False, cuda=True, wait_steps=1000).start(10)
    with pytest.raises(ConfigError, match="profiler.active_steps=0"):
        window("cpu", enabled=False, active_steps=0)
