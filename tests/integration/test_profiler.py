"""The profiler's window of a run: which steps, which ranks, and what each key adds to the trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.distributed.harness import run_recipe

RANGES = ("data", "forward", "backward", "optimizer")
WINDOW = ("profiler.enabled=true", "profiler.wait_steps=1", "profiler.warmup_steps=1", "profiler.active_steps=2")
SHORT = ("epochs=1", "save_every_n_steps=null")  # 4 steps of 2 passes


def traces(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> trace, in the order in which they were written."""
    return {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.pt.trace.json"))}


def names(trace: dict[str, Any], category: str) -> list[str]:
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") == category]


def profiled(config: Path, output_dir: Path, *overrides: str, size: int = 1) -> str:
    outcome = run_recipe(config, f"output_dir={output_dir}", *SHORT, *overrides, size=size)
    assert outcome.codes == [0] * size, outcome.outputs
    return outcome.outputs[0]


def test_each_rank_leaves_a_trace_of_the_active_steps(config: Path, tmp_path: Path) -> None:
    """Of steps 3 and 4 (numbered from 0: 2 and 3), where TensorBoard looks for them, and the run says so."""
    output = profiled(config, tmp_path, *WINDOW, size=2)
    folder = tmp_path / "logs" / "plugins" / "profile"
    assert f"traces of each rank go to {folder}" in output
    found = traces(folder)
    assert [name.split(".")[0] for name in found] == ["rank0", "rank1"]
    for trace in found.values():
        ranges = names(trace, "user_annotation")
        steps = [name for name in ranges if name.startswith("ProfilerStep#")]
        assert steps == ["ProfilerStep#2", "ProfilerStep#3"]
        # With two ranks one pass a step.
        assert {name: ranges.count(name) for name in RANGES} == dict.fromkeys(RANGES, 2)
        assert any("FSDP" in name for name in ranges)


def test_updates_in_the_backward_pass_are_inside_it(config: Path, tmp_path: Path) -> None:
    """One range for each parameter."""
    profiled(config, tmp_path, *WINDOW, "optimizer_in_bwd=true", "clip_grad_norm=null", "batch_size=2")
    (trace,) = traces(tmp_path / "logs" / "plugins" / "profile").values()
    spans: dict[str, list[tuple[float, float]]] = {"backward": [], "optimizer": []}
    for event in trace["traceEvents"]:
        if event.get("cat") == "user_annotation" and event["name"] in spans:
            spans[event["name"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(spans["optimizer"]) > 2 * 10
    for start, end in spans["optimizer"]:
        assert any(a <= start and end <= b for a, b in spans["backward"])


def test_a_trace_for_each_cycle(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    cycles = ("profiler.wait_steps=0", "profiler.active_steps=1", "profiler.num_cycles=2")
    profiled(config, tmp_path / "out", *WINDOW, *cycles, f"profiler.output_dir={folder}", "profiler.with_flops=true")
    assert all(trace["with_flops"] for trace in traces(folder).values())
    steps = [
        [name for name in names(trace, "user_annotation") if name.startswith("ProfilerStep#")]
        for trace in traces(folder).values()
    ]
    assert steps == [["ProfilerStep#1"], ["ProfilerStep#3"]]


def test_what_each_key_adds(config: Path, tmp_path: Path) -> None:
    """Switched the other way than by default."""
    plain, other = tmp_path / "plain", tmp_path / "other"
    keys = ("profiler.profile_memory=true", "profiler.with_stack=true", "profiler.record_shapes=false")
    profiled(config, tmp_path, *WINDOW, f"profiler.output_dir={plain}")
    profiled(config, tmp_path, "resume=never", *WINDOW, f"profiler.output_dir={other}", *keys)
    (without,), (with_,) = traces(plain).values(), traces(other).values()
    assert has_shapes(without) and not has_shapes(with_)
    assert "[memory]" not in names(without, "cpu_instant_event") and "[memory]" in names(with_, "cpu_instant_event")
    assert not names(without, "python_function") and names(with_, "python_function")


def has_shapes(trace: dict[str, Any]) -> bool:
    return any("Input Dims" in event.get("args", {}) for event in trace["traceEvents"])


def test_off_unless_asked_for(config: Path, tmp_path: Path) -> None:
    profiled(config, tmp_path, "profiler.active_steps=1")
    assert not list(tmp_path.rglob("*.trace.json"))


def test_a_resumed_run_too_short_for_the_window_says_so(config: Path, finished: Path, tmp_path: Path) -> None:
    step_6 = f"resume={finished / 'checkpoints' / 'step-6'}"
    outcome = run_recipe(config, f"output_dir={tmp_path}", *WINDOW, step_6)
    assert outcome.codes == [0]
    assert "profiler: no effect, 2 steps are left and its window needs 4" in outcome.outputs[0]
    assert not list(tmp_path.rglob("*.trace.json"))
