"""The keys of the ``plan`` command beside those of the config."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lrdint_tune.errors import ConfigError
from lrdint_tune.planning.plan import Target
from lrdint_tune.planning.timing import Network
from lrdint_tune.training.hardware import HARDWARE, Hardware

_FIGURES = {f.name: f.type for f in dataclasses.fields(Hardware) if f.name not in ("name", "device_names")}
CPU = "cpu"


@dataclass(frozen=True)
class PlanOptions:
    """Attributes:
    world_size: ranks to plan for.
    gpu: a name of ``lrdint_tune.training.hardware.HARDWARE``, or ``cpu``, of which nothing is known.
    hardware: figures in place of the table's, e.g. ``hardware.memory_gib=60``; with all of them no ``gpu`` is needed.
    gpus_per_node: ranks that share a node's links.
    network_gb_per_s: from a GPU to other nodes, in one direction; 50 is a 400 Gb/s port for each.
    attainable: share of the peak that products reach, with everything between them.
    usable: share of a device's memory that a run may fill.
    output: a file for the plan as JSON.
    """

    world_size: int
    gpu: str | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    gpus_per_node: int = 8
    network_gb_per_s: float = 50.0
    attainable: float = 0.6
    usable: float = 0.9
    output: str | None = None

    def __post_init__(self) -> None:
        for key in ("world_size", "gpus_per_node"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)}: must be at least 1")
        for key in ("attainable", "usable"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"{key}={getattr(self, key)}: must be above 0 and at most 1")
        if self.network_gb_per_s <= 0:
            raise ConfigError(f"network_gb_per_s={self.network_gb_per_s}: must be positive")
        if self.gpu is not None and self.gpu not in (*HARDWARE, CPU):
            raise ConfigError(f"gpu={self.gpu!r}: unknown; choose from {', '.join((*HARDWARE, CPU))}")
        for figure, value in self.hardware.items():
            if figure not in _FIGURES:
                raise ConfigError(f"hardware.{figure}={value!r}: unknown; choose from {', '.join(_FIGURES)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ConfigError(f"hardware.{figure}={value!r}: must be a positive number")
        missing = [figure for figure in _FIGURES if figure not in self.hardware and figure != "fp8_tflops"]
        if self.gpu is None and missing:
            raise ConfigError(
                f"gpu: missing; choose from {', '.join((*HARDWARE, CPU))}, or give "
                + ", ".join(f"hardware.{figure}" for figure in missing)
            )
        if self.gpu == CPU and self.hardware:
            raise ConfigError(f"gpu='cpu': takes no figures, and hardware={self.hardware} is set; remove one of them")

    @property
    def target(self) -> Target:
        figures: Hardware | None = None
        if self.gpu is None:
            figures = Hardware(name="GPU of given figures", device_names=(), **{"fp8_tflops": None, **self.hardware})
        elif self.gpu != CPU:
            figures = dataclasses.replace(HARDWARE[self.gpu], **self.hardware)
        return Target(
            world_size=self.world_size,
            hardware=figures,
            network=Network(self.gpus_per_node, self.network_gb_per_s),
            attainable=self.attainable,
            usable=self.usable,
        )
