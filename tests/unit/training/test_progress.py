"""Rates that count what they say, and a bar that shows them."""

import pytest
import torch

from lrdint_tune.training import progress as module
from lrdint_tune.training.progress import Progress, Throughput, memory_values


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    throughput = Throughput(flops_per_token=3e12, causal_flops_per_token=2e12, world_size=2, peak_tflops=150)
    throughput.add(40, 0.5)
    throughput.add(60, 1.5)
    now[0] += 4
    assert throughput.take() == {
        "throughput(tps)": 25.0,
        "tflops": 25.0 * 3 / 2,
        "tflops_causal": 25.0,
        "mfu(%)": 25.0,
        "time_metrics/end_to_end(s)": 2.0,
        "time_metrics/data_loading(s)": 1.0,
        "throughput/tokens_per_second": 25.0,
        "throughput/seconds_per_step": 2.0,
    }
    now[0] += 3  # a validation, say
    throughput.reset()
    now[0] += 1
    throughput.add(10, 0)
    assert throughput.take()["throughput(tps)"] == 10.0


def test_no_mfu_without_a_peak() -> None:
    throughput = Throughput(flops_per_token=3e12, causal_flops_per_token=2e12, world_size=2)
    throughput.add(40, 0.5)
    assert not any(tag.startswith("mfu") for tag in throughput.take())


def test_memory_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": 3, "num_ooms": 1, "other": 7})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2**31)
    assert memory_values(torch.device("cuda")) == {
        "memory/max_active(GiB)": 1.0,
        "memory/max_reserved(GiB)": 2.0,
        "memory/num_alloc_retries": 3,
        "memory/num_ooms": 1,
    }


def test_memory() -> None:
    (value,) = memory_values(torch.device("cpu")).values()
    assert 0.05 < value < 100  # GiB of this process


def test_progress_shows_loss_and_rate(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=10, done=4, enabled=True)
    progress.update(1.2345, 1000)
    progress.message("step 5: fine")
    progress.close()
    out, err = capsys.readouterr()
    assert "step 5: fine" in out
    assert "loss=1.2345" in err and "tok_s=1,000" in err and "5/10" in err


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=10, done=0, enabled=False)
    progress.update(1.0, 1.0)
    progress.message("no")
    progress.close()
    assert capsys.readouterr() == ("", "")
