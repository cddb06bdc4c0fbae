"""What the vendors say their devices can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: how people call it.
        device_names: what ``torch.cuda.get_device_name`` says; whole names, for a part of a device (MIG) or a slower
            sister (``RTX 4090 Laptop GPU``) only adds words.
        bf16_tflops: peak of dense bf16 matrix products, accumulated in float32, in TFLOP/s.
        fp8_tflops: of fp8 products; None where there are none.
        tf32_tflops: of float32 products rounded to TF32.
        fp32_tflops: of float32 products.
        memory_gib: what torch can allocate at most, in GiB (``total_memory``).
        memory_gb_per_s: of the device's memory, in GB/s.
        link_gb_per_s: to the other devices of its node, in one direction, in GB/s; datasheets add both directions.
    """

    name: str
    device_names: tuple[str, ...]
    bf16_tflops: float
    fp8_tflops: float | None
    tf32_tflops: float
    fp32_tflops: float
    memory_gib: float
    memory_gb_per_s: float
    link_gb_per_s: float


# From the vendors' datasheets: NVIDIA A100, H100, H200, HGX B200, L40S, Ada architecture (RTX 4090), AMD MI300X and
# MI325X. Where a datasheet gives the figure "with sparsity", half of it. Links: NVLink, PCIe or Infinity Fabric.
HARDWARE: dict[str, Hardware] = {
    "a100_40": Hardware("A100 40GB", ("NVIDIA A100-SXM4-40GB",), 312, None, 156, 19.5, 39.4, 1555, 300),
    "a100_40_pcie": Hardware("A100 40GB PCIe", ("NVIDIA A100-PCIE-40GB",), 312, None, 156, 19.5, 39.4, 1555, 32),
    "a100": Hardware("A100 80GB", ("NVIDIA A100-SXM4-80GB",), 312, None, 156, 19.5, 79.1, 2039, 300),
    "a100_pcie": Hardware("A100 80GB PCIe", ("NVIDIA A100 80GB PCIe",), 312, None, 156, 19.5, 79.1, 1935, 32),
    "h100": Hardware("H100 SXM", ("NVIDIA H100 80GB HBM3",), 989, 1979, 494, 67, 79.1, 3350, 450),
    "h100_pcie": Hardware("H100 PCIe", ("NVIDIA H100 PCIe",), 756, 1513, 378, 51, 79.1, 2000, 64),
    "h100_nvl": Hardware("H100 NVL", ("NVIDIA H100 NVL",), 835, 1671, 417, 60, 93.1, 3900, 300),
    "h200": Hardware("H200 SXM", ("NVIDIA H200",), 989, 1979, 494, 67, 139.8, 4800, 450),
    "b200": Hardware("B200", ("NVIDIA B200",), 2250, 4500, 1125, 75, 178.3, 7700, 900),
    "l40s": Hardware("L40S", ("NVIDIA L40S",), 362, 733, 183, 91.6, 44.4, 864, 32),
    "rtx4090": Hardware("RTX 4090", ("NVIDIA GeForce RTX 4090",), 165, 330, 82.6, 82.6, 23.6, 1008, 32),
    "mi300x": Hardware(
        "MI300X", ("AMD Instinct MI300X", "AMD Instinct MI300X OAM"), 1307, 2615, 653, 163, 191.5, 5300, 448
    ),
    "mi325x": Hardware(
        "MI325X", ("AMD Instinct MI325X", "AMD Instinct MI325X OAM"), 1307, 2615, 653, 163, 255.5, 6000, 448
    ),
}


def find_hardware(device_name: str) -> Hardware | None:
    """The entry of a device by the name that torch gives it; None if it is not in the table."""
    return next((entry for entry in HARDWARE.values() if device_name in entry.device_names), None)


def peak_tflops(device: torch.device, dtype: str) -> float | None:
    """Peak of this process's device in TFLOP/s for matrix products in ``bf16`` or ``fp32`` (TF32 where torch is set to
    use it); None where nothing is known, which includes every CPU."""
    if device.type != "cuda":
        return None
    entry = find_hardware(torch.cuda.get_device_name(device))
    if entry is None:
        return None
    if dtype == "bf16":
        return entry.bf16_tflops
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return entry.tf32_tflops if tf32 else entry.fp32_tflops
