"""The configs of ``lrdint_tune/evaluate`` and ``lrdint_tune/report``.

Not in the modules that are run: their types are looked up by name, which ``tune run``'s ``__main__`` does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.loading import DTYPES
from lrdint_tune.evaluation.scoring import MAX_TOKENS
from lrdint_tune.options import positive_int
from lrdint_tune.training.config import Section, check_choice


@dataclass(frozen=True, kw_only=True)
class LoadingConfig:
    """How a model folder is loaded.

    Attributes:
        base_model: the pretrained folder of an adapter or a checkpoint, if it is elsewhere now.
        tokenizer: a section as in training configs; null: the tokenizer in the model's folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``fp32`` or ``bf16``.
    """

    base_model: str | None = None
    tokenizer: Section | None = None
    device: str = "auto"
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_choice("dtype", self.dtype, tuple(DTYPES))
        if self.tokenizer is not None and "_component_" not in self.tokenizer:
            raise ConfigError(f"tokenizer={self.tokenizer}: has no _component_; give the dotted path of what to build")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LoadingConfig):
    """The keys of configs/evaluate.yaml.

    Attributes:
        model: what :func:`~lrdint_tune.evaluation.loading.load_model` takes.
        output_dir: where ``results.json`` is written.
        tasks: what to measure, see docs/evaluation.md.
        baseline: another model's ``results.json``.
        max_seq_len: the most tokens given to the model at once; null: its limit.
        max_tokens: of a forward, padding included.
        seed: of what tasks draw, and of the bootstrap.
    """

    model: str
    output_dir: str
    tasks: list[Any]
    baseline: str | None = None
    max_seq_len: int | None = None
    max_tokens: int = MAX_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ConfigError("tasks=[]: nothing to measure; list some, see configs/evaluate.yaml")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens}: must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(LoadingConfig):
    """The keys of configs/report.yaml; those of loading are for model folders.

    Attributes:
        run: output folder of a run that had an ``attention_probe``; or else
        before, after: each a ``step-N.json`` of such a run, or a folder of a model, which is then looked at.
        output: the file; null: ``report.html`` in the run's folder, or here.
        text_file, max_tokens, top_k, heads_shown: for model folders, as in a run's ``attention_probe``.
    """

    run: str | None = None
    before: str | None = None
    after: str | None = None
    output: str | None = None
    device: str = "cpu"
    text_file: str | None = None
    max_tokens: int = 256
    top_k: int = 8
    heads_shown: int = 4

    def __post_init__(self) -> None:
        if (self.run is None) == (self.before is None) or (self.before is None) != (self.after is None):
            raise ConfigError(
                f"run={self.run!r}, before={self.before!r}, after={self.after!r}: give either run, or before and after"
            )
        super().__post_init__()
        for key in ("max_tokens", "top_k", "heads_shown"):
            positive_int(key, getattr(self, key))
