"""The command: results as JSON, what is not measured twice, and differences to a baseline."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lrdint_tune import evaluate
from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation import record
from lrdint_tune.evaluation.loading import Loaded
from lrdint_tune.evaluation.run import compare, evaluate_model, is_same_task
from lrdint_tune.evaluation.tasks import Task, build_tasks, registry, settings
from lrdint_tune.export import save_hf_folder
from lrdint_tune.models import llama3_2
from lrdint_tune.models.hf import iter_hf_folder
from tests.common.tiny_run import SIZES

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    rows = [{"query": f"Question: {n}?", "choices": ["one", "two", "three"], "gold": n % 3} for n in range(8)]
    words = [{"text": f"Some {n} words and a last"} for n in range(5)]
    for name, content in {"arc": rows, "lambada": words}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    return {path.stem: str(path) for path in tmp_path.iterdir()}


@pytest.fixture
def run(files: dict[str, str], model_folder: Path, tmp_path: Path) -> Run:
    """The command on ARC's rows, or as the keys say; returns the file that it wrote."""

    def call(**keys: Any) -> dict[str, Any]:
        output = tmp_path / str(keys.pop("output", "out"))
        tasks = keys.pop("tasks", [{"task": "arc_easy", "file": files["arc"]}])
        cfg = {"model": str(model_folder), "output_dir": str(output), "device": "cpu", "tasks": tasks, **keys}
        assert evaluate.recipe_main.__wrapped__(OmegaConf.create(cfg)) == 0  # type: ignore[attr-defined]
        return json.loads((output / "results.json").read_text())

    return call


def test_the_results_file(run: Run, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [{"task": "arc_easy", "file": files["arc"], "limit": 6}, {"task": "lambada", "file": files["lambada"]}]
    found = run(tasks=tasks)
    assert (found["method"], found["leaks_future"], found["dtype"], found["seed"]) == ("none", False, "fp32", 0)
    assert found["versions"]["torch"] == torch.__version__
    arc = found["tasks"]["arc_easy"]
    assert arc["metrics"]["acc"]["n"] == len(arc["items"]["acc"]["values"]) == 6
    assert arc["metrics"]["acc"]["mean"] == pytest.approx(sum(arc["items"]["acc"]["values"]) / 6)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[1:]] == [
        ["arc_easy", "acc"],
        ["arc_easy", "acc_norm"],
        ["lambada", "acc"],
        ["lambada", "nll"],
        ["lambada", "perplexity"],
    ]


def test_tasks_in_the_file_are_not_measured_again(run: Run, files: dict[str, str]) -> None:
    first = run()
    both = [{"task": "arc_easy", "file": files["arc"]}, {"task": "lambada", "file": files["lambada"]}]
    second = run(tasks=both)
    assert second["tasks"]["arc_easy"] == first["tasks"]["arc_easy"]  # its seconds too
    third = run(tasks=[{"task": "arc_easy", "file": files["arc"], "limit": 4}])
    assert third["tasks"]["arc_easy"]["metrics"]["acc"]["n"] == 4
    assert third["tasks"]["lambada"] == second["tasks"]["lambada"], "what is not asked for now stays"


def test_another_content_of_the_file_is_measured_again(run: Run, files: dict[str, str]) -> None:
    assert run()["tasks"]["arc_easy"]["metrics"]["acc"]["n"] == 8
    lines = Path(files["arc"]).read_text().splitlines(keepends=True)
    Path(files["arc"]).write_text("".join(lines[:5]))
    assert run()["tasks"]["arc_easy"]["metrics"]["acc"]["n"] == 5


def nll_task(**dataset: Any) -> Task:
    return build_tasks([{"task": "nll", "dataset": {"_component_": "some.dataset", **dataset}}])["nll"]


@pytest.mark.parametrize(
    "dataset",
    [
        {"source": "json", "data_files": "{tmp}/*.jsonl"},
        {"source": "json", "data_files": ["{tmp}/a.jsonl", "{tmp}/b.jsonl"]},
        {"source": "csv", "data_files": {"train": "{tmp}/a.jsonl", "test": "{tmp}/b*"}},
        {"source": "{tmp}"},
        {"data_files": "{tmp}/b.jsonl"},  # text_dataset's source
    ],
)
def test_data_are_the_same_by_content_wherever_they_are(dataset: dict[str, Any], tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for name in "ab":
            (tmp_path / place / f"{name}.jsonl").write_text(name)
    here, there = (
        nll_task(**json.loads(json.dumps(dataset).replace("{tmp}", str(tmp_path / place))))
        for place in ("here", "there")
    )
    result = json.loads(json.dumps({"settings": settings(here)}))
    assert is_same_task(result, here) and is_same_task(result, there)
    (tmp_path / "there" / "b.jsonl").write_text("other")
    assert not is_same_task(result, there)


def test_places_without_a_digest_are_compared_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.jsonl", "two.jsonl"):  # not the hub's files of these names
        (tmp_path / name).write_text("x")
    result = {"settings": settings(nll_task(source="user/set", data_files="one.jsonl", cache_dir="a"))}
    assert is_same_task(result, nll_task(source="user/set", data_files="one.jsonl", cache_dir="b"))
    assert not is_same_task(result, nll_task(source="user/set", data_files="two.jsonl", cache_dir="a"))


def test_another_lm_eval_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "require_lm_eval", lambda: None)
    monkeypatch.setattr(registry, "version", lambda package: "1")
    task = build_tasks([{"task": "some_task", "source": "lm_eval"}])["some_task"]
    result = {"settings": settings(task)}
    assert is_same_task(result, task)
    monkeypatch.setattr(registry, "version", lambda package: "2")
    assert not is_same_task(result, task)


def test_another_tokenizer_or_version_is_not_mixed_in(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    folder = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    run(model=str(folder))  # elsewhere, but the same
    monkeypatch.setattr(record, "__version__", "9")
    with pytest.raises(ConfigError, match=r"with lrdint_tune='[\d.]+', this is .* '9'"):
        run()
    monkeypatch.undo()
    file = folder / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"with tokenizer='\w+', this is"):
        run(model=str(folder))


def test_another_models_results_are_not_mixed_in(run: Run) -> None:
    run()
    with pytest.raises(ConfigError, match=r"output_dir=.*holds results of .* with dtype='fp32', this is .* 'bf16'"):
        run(dtype="bf16")


def test_baseline(run: Run, model_folder: Path, tmp_path: Path, files: dict[str, str]) -> None:
    model = llama3_2(**SIZES)
    model.load_state_dict(dict(iter_hf_folder(model_folder, model.spec)))
    with torch.no_grad():
        model.norm.scale.mul_(0.1)  # flatter distributions: other likelihoods
    tensors = model.state_dict().items()
    save_hf_folder(tmp_path / "flat", tensors, model.spec, dtype=torch.float32, tokenizer_files_from=model_folder)
    tasks = [{"task": "lambada", "file": files["lambada"]}]
    base = run(output="base", tasks=tasks)
    ours = run(output="ours", tasks=tasks, model=str(tmp_path / "flat"), baseline=str(tmp_path / "base/results.json"))
    difference = ours["baseline"]["differences"]["lambada"]["nll"]
    means = [found["tasks"]["lambada"]["metrics"]["nll"]["mean"] for found in (ours, base)]
    assert difference["mean"] == pytest.approx(means[0] - means[1]) and means[0] != means[1]
    assert difference["low"] < difference["mean"] < difference["high"]


def test_baseline_of_other_items(run: Run, files: dict[str, str], tmp_path: Path) -> None:
    run(output="base", tasks=[{"task": "arc_easy", "file": files["arc"], "limit": 4}])
    with pytest.raises(ConfigError, match="baseline: arc_easy has limit=4 there and None here"):
        run(output="ours", baseline=str(tmp_path / "base/results.json"))


@pytest.mark.parametrize("key, value", [("seed", 1), ("max_seq_len", 100)])
def test_baseline_of_other_draws(run: Run, tmp_path: Path, key: str, value: int) -> None:
    run(output="base")
    with pytest.raises(ConfigError, match=rf"{key}={value}: the baseline '.*base/results\.json' was measured with "):
        run(output="ours", baseline=str(tmp_path / "base/results.json"), **{key: value})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": []}, r"tasks=\[\]: nothing to measure"),
        ({"baseline": "nowhere.json"}, "baseline='nowhere.json': cannot be read"),
        ({"dtype": "fp16"}, "dtype='fp16': unknown"),
        ({"max_seq_len": 5000}, "max_seq_len=5000: must be from 2 to the model's limit, 512"),
        ({"model": "nowhere"}, "model='nowhere': no such folder"),
    ],
)
def test_bad_keys(run: Run, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**keys)


def test_several_processes_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2: the evaluation is one process"):
        run()


def test_long_text_and_held_out_rows_agree(loaded: Loaded, files: dict[str, str], tmp_path: Path) -> None:
    """One short text as a document of a data set, and as a window: the same tokens, but for what stands before."""
    dataset = {
        "_component_": "lrdint_tune.training.data.text_dataset",
        "source": "text",
        "data_files": files["text"],
        "add_bos": True,
        "add_eos": False,
        "document_separator": "@@",
        "cache_dir": str(tmp_path / "cache"),
    }
    tasks: list[dict[str, Any]] = [
        {"task": "nll", "dataset": dataset, "max_seq_len": 200, "prefix_wise_positions": 8},
        {"task": "wikitext", "file": files["text"], "window": 200},
    ]
    results = evaluate_model(loaded.model, loaded.tokenizer, tasks, device="cpu")
    nll, text = results["nll"]["metrics"], results["wikitext"]["metrics"]
    assert nll["perplexity"]["mean"] == pytest.approx(math.exp(nll["nll"]["mean"]))
    assert nll["leak"]["mean"] == pytest.approx(0, abs=1e-5)
    paired = compare(results, results)["nll"]
    assert paired.keys() == {"nll", "teacher_forced", "prefix_wise", "leak"}
    assert all(difference.mean == 0 for difference in paired.values())
    assert sum(results["wikitext"]["items"]["nll"]["counts"]) == 900  # one token per byte
    total = sum(results["wikitext"]["items"]["nll"]["values"])
    assert text["word_perplexity"]["mean"] == pytest.approx(math.exp(total / 180))
    # Both cut 900 tokens into windows; the last one has more context here.
    assert nll["nll"]["mean"] == pytest.approx(text["nll"]["mean"], rel=0.05)


def test_lines_of_a_text_end_at_newlines(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("one two\x0bthree\nfour five\n")
    task = {"task": "wikitext", "file": str(tmp_path / "text"), "limit": 1}
    result = evaluate_model(loaded.model, loaded.tokenizer, [task], device="cpu")["wikitext"]
    assert sum(result["items"]["nll"]["counts"]) == 14  # one token per byte


def test_a_metric_over_other_tokens_does_not_pair() -> None:
    def result(count: float) -> dict[str, Any]:
        return {"nll": {"settings": {}, "items": {"nll": {"values": [1.0, 2.0], "counts": [3.0, count]}}}}

    assert compare(result(4), result(4))["nll"]["nll"].mean == 0
    with pytest.raises(ConfigError, match="other items or other tokens"):
        compare(result(4), result(5))
