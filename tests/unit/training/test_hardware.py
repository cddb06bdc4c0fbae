"""The peak that MFU is measured against is the device's own, or there is none."""

import pytest
import torch

from lrdint_tune.training.hardware import HARDWARE, device_peak, find_hardware

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("device_name", "short_name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100_40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_devices_are_found_by_name(device_name: str, short_name: str) -> None:
    assert find_hardware(device_name) is HARDWARE[short_name]


@pytest.mark.parametrize(
    "device_name",
    ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L40", "NVIDIA H20", "A100", ""],
)
def test_other_devices_are_not_guessed(device_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_hardware(device_name) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
    assert device_peak(CUDA, "bf16") is None


def test_no_two_entries_share_a_name() -> None:
    names = [name for entry in HARDWARE.values() for name in entry.device_names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("dtype", "precision", "peak"),
    [("bf16", "highest", 312), ("bf16", "high", 312), ("fp32", "highest", 19.5), ("fp32", "high", 156)],
)
def test_peak_of_the_number_format(dtype: str, precision: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 only where torch rounds to it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert device_peak(CUDA, dtype) == peak
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_cpu_has_no_known_peak() -> None:
    assert device_peak(torch.device("cpu"), "fp32") is None
