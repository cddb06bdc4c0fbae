"""The table, the verdicts and the command's own input."""

import json
from pathlib import Path

import pytest

from lrdint_tune.errors import ConfigError
from lrdint_tune.faults import report
from lrdint_tune.faults.__main__ import choose, parse, possible, prepare
from lrdint_tune.faults.experiment import Baseline, Outcome, _judge
from lrdint_tune.faults.faults import FAULTS, CutLink, KillRank, Terminate, unavailable
from lrdint_tune.faults.start import Launch

OWN = Launch("lrdint_tune.launch", Path("c.yaml"), 2)
TAG = "loss_metrics/global_avg_loss"
SAID = {Terminate: "SIGTERM: the step is finished", KillRank: "error: lost rank 1 on vm: no sign of life"}


def outcome(**changes: object) -> Outcome:
    fields = {"fault": "SIGTERM", "moment": "after step 3; to the launcher", "reported": ["SIGTERM: saved"]}
    return Outcome(**{**fields, "codes": [[75], [0]], "difference": 0.0, **changes})  # type: ignore[arg-type]


def judged(folder: Path, fault: type, losses: dict[int, float], launch: Launch = OWN, **changes: object) -> list[str]:
    """The problems of a run that left ``losses``, beside one with 2.0 and 1.0."""
    (folder / "logs").mkdir()
    lines = [json.dumps({"step": step, TAG: loss}) for step, loss in losses.items()]
    (folder / "logs" / "metrics.jsonl").write_text("\n".join(lines))
    found = outcome(reported=[SAID[fault]], **changes)
    _judge(found, fault(), launch, Baseline({1: 2.0, 2: 1.0}, {}, set(), 1.0, 1), folder)
    return found.problems


def test_what_was_promised_passes(tmp_path: Path) -> None:
    assert judged(tmp_path, Terminate, {1: 2.0, 2: 1.0000004}) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"losses": {1: 2.0, 2: 1.00001}}, "losses differ by up to 1.0e-05"),
        ({"losses": {1: 2.0}}, "not every step is recorded once"),
        ({"codes": [[1], [0]]}, "exit code 1, expected 75"),
        ({"codes": [[75, 1], [0, 0]]}, "exit code 1, expected 75"),
        ({"codes": [[75], [75], [75], [75]]}, "did not get to its end in 4 starts"),
        ({"steps_lost": 1}, "lost 1 steps"),
        ({"checkpoints_lost": ["step-8 vanished"]}, "checkpoint step-8 vanished"),
    ],
)
def test_what_was_not_is_a_problem(tmp_path: Path, changes: dict[str, object], problem: str) -> None:
    losses = changes.pop("losses", {1: 2.0, 2: 1.0})
    assert problem in judged(tmp_path, Terminate, losses, **changes)  # type: ignore[arg-type]


def test_silence_on_one_of_two_hosts_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").write_text(json.dumps({"step": 1, TAG: 2.0}))
    found = outcome(reported=["error: lost rank 1 on node-2: gone", ""], codes=[[6, 6], [0, 0]])
    _judge(found, CutLink(), OWN, Baseline({1: 2.0}, {}, set(), 1.0, 1), tmp_path)
    assert found.problems == ["did not say what happened"]


def test_torchrun_has_one_code_for_every_failure(tmp_path: Path) -> None:
    losses = {1: 2.0, 2: 1.0}
    torchrun = Launch("torch.distributed.run", Path("c.yaml"), 2)
    assert judged(tmp_path, KillRank, losses, launch=torchrun, codes=[[1], [0]]) == []


def test_a_document_gets_the_table(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    table = report.markdown([outcome(reported=["a | b"])], "the command", ["A note."])
    report.put_into(document, table)
    text = document.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| 1 | SIGTERM | after step 3; to the launcher | a \\| b | 75, then 0 | 0 | 0 | equal |" in text
    assert "1 faults: 1 runs got to their end, 1 with losses equal to 6 decimals, 0 checkpoints lost; 1 as" in text


def test_every_fault_once_before_any_twice() -> None:
    chosen = choose(2 * len(FAULTS) + 1, 0, list(FAULTS))
    assert set(chosen[: len(FAULTS)]) == set(chosen[len(FAULTS) : -1]) == set(FAULTS)
    assert chosen == choose(2 * len(FAULTS) + 1, 0, list(FAULTS))
    assert chosen != choose(2 * len(FAULTS) + 1, 1, list(FAULTS))


def test_two_hosts_share_the_ranks() -> None:
    assert unavailable(CutLink, world_size=3) is not None
    with pytest.raises(ConfigError, match="nothing can be made here.*link between two hosts cut"):
        possible([CutLink.name], world_size=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_faults", "0"], "--num_faults 0: must be at least 1"),
        (["--keep_last_n_checkpoints", "1"], "--keep_last_n_checkpoints 1: a damaged checkpoint needs an earlier one"),
        (["--config", "absent.yaml"], "--config absent.yaml: no such file"),
        (["--document", "absent.md"], "--document absent.md: has no lines <!--"),
        (["--faults", "3"], "--faults: not an option of this command, nor key=value"),
        (["--output_dir", "."], "--output_dir .: is not empty; name a new folder"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    options, overrides = parse(["--output_dir", str(tmp_path / "new"), *arguments])
    with pytest.raises(ConfigError) as caught:
        prepare(options, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ConfigError, match="--only 'flood': unknown fault; choose from kill -9 of a rank"):
        possible(["flood"], world_size=2)
