"""A killed run, started again with the same command, is the uninterrupted run."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.common.compiling import skip_inductor
from tests.common.tiny_run import read_losses, write_model, write_run
from tests.distributed.harness import run_recipe
from tests.integration.runs import SHORT, assert_same_losses, checkpoints, finished_run, killed, tensorboard, values


def test_resume_in_the_middle_of_an_epoch(config: Path, finished: Path, tmp_path: Path) -> None:
    """Killed twice: in the first epoch, between two checkpoints, and in the second."""
    out = f"output_dir={tmp_path}"
    killed(config, out, step=4)
    assert checkpoints(tmp_path) == ["step-3"]
    assert list(read_losses(tmp_path)) == [1, 2, 3, 4]
    killed(config, out, step=7)
    assert checkpoints(tmp_path) == ["step-3", "step-6"]
    finished_run(config, out)
    assert checkpoints(tmp_path) == ["step-6", "step-8"]
    assert_same_losses(tmp_path, finished)
    assert values(tmp_path, "validation_metrics/loss") == pytest.approx(values(finished, "validation_metrics/loss"))
    assert values(tmp_path, "lr") == values(finished, "lr")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_checkpoint_right_after_a_validation(config: Path, tmp_path: Path, size: int) -> None:
    """A forward without backward leaves FSDP2 with gathered parameters, those of the root too; the save that follows
    must find the optimizer's state all the same."""
    often = ("run_val_every_n_steps=2", "save_every_n_steps=2", "trainable=[all]", "epochs=1")
    finished_run(config, f"output_dir={tmp_path / 'whole'}", *often, size=size)
    killed(config, f"output_dir={tmp_path / 'cut'}", *often, step=2, size=size)
    finished_run(config, f"output_dir={tmp_path / 'cut'}", *often, size=size)
    assert_same_losses(tmp_path / "cut", tmp_path / "whole")
    assert list(values(tmp_path / "cut", "validation_metrics/loss")) == [0, 2, 4]


def test_resume_with_adapters(config: Path, tmp_path: Path) -> None:
    """The start values, the optimizer and dropout's random state are those of the uninterrupted run."""
    lora = "model.adapters=[{type: lora, target_modules: [q_proj, up_proj], lora_dropout: 0.2}, {type: bottleneck}]"
    few = (lora, "trainable=[adapter]", "epochs=1", "save_every_n_steps=2")
    finished_run(config, f"output_dir={tmp_path / 'whole'}", *few)
    killed(config, f"output_dir={tmp_path / 'cut'}", *few, step=3)
    finished_run(config, f"output_dir={tmp_path / 'cut'}", *few)
    assert_same_losses(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_resume_of_a_compiled_run(config: Path, finished: Path, tmp_path: Path) -> None:
    """Checkpoints and exports know nothing of it: a run may begin compiled and go on otherwise."""
    few = ("compile=true", "enable_activation_checkpointing=true", "ac_mode=selective", "epochs=1")
    finished_run(config, f"output_dir={tmp_path / 'whole'}", *few, prepare=[skip_inductor])
    losses = read_losses(finished)
    assert read_losses(tmp_path / "whole") == pytest.approx({step: losses[step] for step in (1, 2, 3, 4)}, abs=1e-4)
    tags = tensorboard(tmp_path / "whole").keys()
    assert {"lambda_mean/layers.1", "o2_o1_ratio/layers.0"} <= tags == tensorboard(finished).keys()
    killed(config, f"output_dir={tmp_path / 'cut'}", *few, step=3, prepare=[skip_inductor])
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    finished_run(config, f"output_dir={tmp_path / 'cut'}", *few, prepare=[skip_inductor])
    assert_same_losses(tmp_path / "cut", tmp_path / "whole")
    finished_run(config, f"output_dir={tmp_path / 'other'}", "epochs=1")
    assert read_losses(tmp_path / "other") == pytest.approx(read_losses(tmp_path / "whole"), abs=1e-4)
    for folder in ("adapter", "hf"):
        for file in (tmp_path / "whole" / folder).glob("*.safetensors"):
            with safe_open(file, "pt") as got, safe_open(finished / folder / file.name, "pt") as want:
                assert set(got.keys()) == set(want.keys()) != set()


def test_resume_when_a_line_was_half_written(config: Path, finished: Path, tmp_path: Path) -> None:
    out = f"output_dir={tmp_path}"
    killed(config, out, step=5)
    with open(tmp_path / "logs" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss_metr')
    finished_run(config, out)
    assert_same_losses(tmp_path, finished)


def test_killed_before_the_first_checkpoint(config: Path, finished: Path, tmp_path: Path) -> None:
    """It starts from the beginning, and so does the curve."""
    out = f"output_dir={tmp_path}"
    killed(config, out, step=2)
    finished_run(config, out)
    assert_same_losses(tmp_path, finished)


def test_started_again_after_the_end(config: Path, finished: Path, tmp_path: Path) -> None:
    """Nothing is trained twice."""
    out = f"output_dir={tmp_path}"
    finished_run(config, out)
    finished_run(config, out)
    assert_same_losses(tmp_path, finished)


def test_annealed_schedule_goes_on(config: Path, tmp_path: Path) -> None:
    """λ of every step, and the step in the checkpoint."""
    annealed = ("model.lam=annealed", "model.anneal_steps=7")
    finished_run(config, f"output_dir={tmp_path / 'whole'}", *annealed)
    killed(config, f"output_dir={tmp_path / 'cut'}", *annealed, step=7)
    finished_run(config, f"output_dir={tmp_path / 'cut'}", *annealed)
    assert_same_losses(tmp_path / "cut", tmp_path / "whole")
    lam = values(tmp_path / "whole", "lambda_mean/layers.1")
    assert len(set(lam.values())) == 8, "λ changes in every step, or nothing is tested"
    assert values(tmp_path / "cut", "lambda_mean/layers.1") == lam


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_resume_with_uneven_shards_and_other_world_sizes(
    uneven: tuple[Path, Path], tmp_path: Path, before: int, after: int
) -> None:
    """3 heads over 2 ranks: λ is split 2 + 1, and k2.up of the one key head is on one rank only."""
    config, whole = uneven
    out = f"output_dir={tmp_path}"
    killed(config, out, step=7, size=before, rank=before - 1)
    assert "step-6" in checkpoints(tmp_path)
    finished_run(config, out, size=after)
    assert_same_losses(tmp_path, whole)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("uneven")
    sizes = {"num_heads": 3, "num_kv_heads": 1, "embed_dim": 24}
    write_model(folder / "model", **sizes)
    config = write_run(
        folder, **{f"model__{key}": value for key, value in sizes.items()}, model__lam="annealed", **SHORT
    )
    finished_run(config)
    return config, folder / "out"


def test_resume_from_a_named_checkpoint(config: Path, finished: Path, tmp_path: Path) -> None:
    finished_run(config, f"output_dir={tmp_path}", f"resume={finished / 'checkpoints' / 'step-6'}")
    assert list(read_losses(tmp_path)) == [7, 8]
    assert_same_losses(tmp_path, {step: read_losses(finished)[step] for step in (7, 8)})


def test_never_resume(config: Path, finished: Path, tmp_path: Path) -> None:
    """Trained from the beginning, one curve, and the checkpoints of the earlier run do not outlive it."""
    out = f"output_dir={tmp_path}"
    finished_run(config, out, "seed=1")
    finished_run(config, out, "resume=never")
    assert_same_losses(tmp_path, finished)
    state = json.loads((tmp_path / "checkpoints" / "step-8" / "train_state.json").read_text())
    assert state["run"]["seed"] == 0


def test_never_resume_killed_and_resumed(config: Path, finished: Path, tmp_path: Path) -> None:
    """The later ``auto`` goes on with the new run, not with the earlier one that had come further."""
    out = f"output_dir={tmp_path}"
    finished_run(config, out, "optimizer.lr=0.1")
    killed(config, out, "resume=never", step=4)
    finished_run(config, out)
    assert_same_losses(tmp_path, finished)


def test_back_to_an_earlier_checkpoint(config: Path, finished: Path, tmp_path: Path) -> None:
    """What came after it is moved away, not lost and not found by a later ``auto``."""
    out = f"output_dir={tmp_path}"
    finished_run(config, out, "keep_last_n_checkpoints=4")
    killed(config, out, f"resume={tmp_path / 'checkpoints' / 'step-3'}", step=5)
    assert checkpoints(tmp_path) == ["set-aside-1", "step-3"]
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "set-aside-1").iterdir()) == ["step-6", "step-8"]
    finished_run(config, out)
    assert_same_losses(tmp_path, finished)


def test_another_learning_rate_is_reported_to_have_no_effect(config: Path, tmp_path: Path) -> None:
    out = f"output_dir={tmp_path}"
    killed(config, out, step=5)
    outcome = run_recipe(config, out, "optimizer.lr=0.1")
    assert outcome.codes == [0]
    assert "optimizer.lr, lam_lr: no effect" in outcome.outputs[0]


def test_the_curve_has_the_standard_tags(finished: Path) -> None:
    tags = tensorboard(finished).keys()
    assert {
        "loss_metrics/global_avg_loss",
        "validation_metrics/loss",
        "lr",
        "grad_norm",
        "throughput(tps)",
        "tflops",
        "tflops_causal",
        "lambda_mean/layers.0",
        "o2_o1_ratio/layers.1",
        "adapter_grad_norm/layers.1",
    } <= tags
    assert "mfu(%)" not in tags, "nobody knows this device's peak"


def test_mfu_against_a_given_peak(config: Path, tmp_path: Path) -> None:
    finished_run(config, f"output_dir={tmp_path}", "peak_tflops=0.5", "epochs=1", "max_steps_per_epoch=2")
    tflops, causal, mfu = (values(tmp_path, tag) for tag in ("tflops", "tflops_causal", "mfu(%)"))
    assert list(mfu) == [1, 2]
    for step in mfu:
        assert mfu[step] == pytest.approx(200 * tflops[step])
        assert 0.5 * tflops[step] < causal[step] < tflops[step]
