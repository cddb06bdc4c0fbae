"""The disk of the curves is full: the run goes on to its end, and what can be read is right."""

import subprocess
from pathlib import Path

import pytest

from tests.common.tiny_run import read_losses
from tests.distributed.harness import run_recipe
from tests.integration.runs import tree


def test_run_with_full_logs(config: Path, finished: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        component = "lrdint_tune.training.metrics.TensorBoardLogger"
        logger = [f"metric_logger._component_={component}", f"metric_logger.log_dir={disk}"]
        outcome = run_recipe(config, f"output_dir={tmp_path / 'out'}", *logger, size=2)
        assert outcome.codes == [0, 0], outcome.outputs
        text = "\n".join(outcome.lines)
        assert text.count("cannot be written (No space left on device)") == 1
        assert text.count("the last values were not written") == 1
        assert "held-out NLL per token" in text and "at step 8" in text  # from memory
        (tmp_path / "logs").symlink_to(disk)
        losses = read_losses(tmp_path)
        assert 0 < len(losses) < 8
        assert all(abs(loss - read_losses(finished)[step]) < 1e-4 for step, loss in losses.items())
        assert {"adapter/adapter_model.safetensors", "hf/model.safetensors"} <= tree(tmp_path / "out").keys()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
