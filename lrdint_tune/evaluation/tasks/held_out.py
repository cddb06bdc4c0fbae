"""Held-out losses: of a data set's documents, of prefixes alone, and of one long text."""

from __future__ import annotations

import dataclasses
import logging
import math
from itertools import islice
from pathlib import Path
from typing import Any

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.measured import Measured, Values, perplexity
from lrdint_tune.evaluation.nll import document_nll, measure_leak
from lrdint_tune.evaluation.scoring import Scorer
from lrdint_tune.evaluation.statistics import Estimate
from lrdint_tune.training.components import build
from lrdint_tune.training.config import Section

log = logging.getLogger(__name__)

_READERS = ("json", "text", "csv", "parquet", "arrow")  # sources of which ``data_files`` are paths here


@dataclasses.dataclass(frozen=True)
class NllTask:
    """Loss per trained token of a data set, document by document.

    Attributes:
        task: ``nll``.
        name: under which the results stand; None: ``nll``.
        dataset: a section as in training configs; with ``sft_dataset`` only the answers' tokens count.
        max_seq_len: of the dataset; None: the evaluation's.
        prefix_wise_positions: how many tokens to predict from their prefix alone as well, or None.
    """

    dataset: Section
    task: str = "nll"
    name: str | None = None
    max_seq_len: int | None = None
    prefix_wise_positions: int | None = None

    def __post_init__(self) -> None:
        if "_component_" not in self.dataset:
            raise ConfigError(f"dataset={self.dataset}: has no _component_; give the dotted path of what to build")
        for key in ("max_seq_len", "prefix_wise_positions"):
            value = getattr(self, key)
            if value is not None and value < 2:
                raise ConfigError(f"{key}={value}: must be at least 2")

    def places(self) -> dict[str, Any]:
        """Options that may stand for local files. ``data_files`` of a data set on the hub or in a folder are paths in
        that."""
        source = self.dataset.get("source", "text")
        if source in _READERS:
            return {"dataset.data_files": self.dataset.get("data_files")}
        return {"dataset.source": source}

    def versions(self) -> dict[str, str]:
        return {}

    def measure(self, scorer: Scorer, seed: int) -> Measured:
        """``nll`` in nats per token with its standard error over documents, and ``perplexity``. With
        ``prefix_wise_positions`` also ``teacher_forced`` and ``prefix_wise``, the NLL at the same drawn positions, and
        ``leak``, the second minus the first: 0 for a causal model."""
        section = {key: value for key, value in self.dataset.items() if key != "packed"}
        if self.dataset.get("packed"):
            log.warning("dataset.packed=true: has no effect here, each document is evaluated by itself")
        length = self.max_seq_len or scorer.max_seq_len
        rows = build("dataset", section, scorer.tokenizer, max_seq_len=length).documents()
        loss = document_nll(scorer.model, rows, device=scorer.device, max_tokens=scorer.max_tokens)
        nll = Values(loss.sums.tolist(), loss.counts.tolist())
        items = {"nll": nll}
        if self.prefix_wise_positions is not None:
            leak = measure_leak(
                scorer.model,
                rows,
                positions=self.prefix_wise_positions,
                device=scorer.device,
                seed=seed,
                max_tokens=scorer.max_tokens,
            )
            inside, alone, counts = leak.inside_sums, leak.alone_sums, leak.counts.tolist()
            items |= {
                "teacher_forced": Values(inside.tolist(), counts),
                "prefix_wise": Values(alone.tolist(), counts),
                "leak": Values((alone - inside).tolist(), counts),
            }
        return Measured(items, {"perplexity": perplexity(nll.estimate())})


@dataclasses.dataclass(frozen=True)
class LongTextTask:
    """A text file as one document, such as WikiText-2.

    The text is taken as it is (lm-eval's ``wikitext`` undoes its tokenisation, page by page, and has other numbers).

    Attributes:
        task: ``wikitext``.
        name: under which the results stand; None: ``wikitext``.
        file: the text, UTF-8.
        window: tokens that the model sees at once; None: the evaluation's ``max_seq_len``.
        limit: only the first so many lines.
    """

    file: str
    task: str = "wikitext"
    name: str | None = None
    window: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not Path(self.file).is_file():
            raise ConfigError(f"file={self.file!r}: no such file; give a text file")
        if self.window is not None and self.window < 2:
            raise ConfigError(f"window={self.window}: must be at least 2")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit}: must be at least 1")

    def places(self) -> dict[str, Any]:
        return {"file": self.file}

    def versions(self) -> dict[str, str]:
        return {}

    def measure(self, scorer: Scorer, seed: int) -> Measured:
        """``nll`` per token, ``perplexity`` per token and ``word_perplexity``, ``exp`` of the text's whole NLL over
        its words (separated by white space); standard errors over windows, by the delta method."""
        try:
            with open(self.file, encoding="utf-8") as stream:
                text = "".join(islice(stream, self.limit))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"file={self.file!r}: cannot be read ({error}); give a UTF-8 text") from None
        words = len(text.split())
        if not words:
            raise ConfigError(f"file={self.file!r}: no word in it; give a text")
        windows = scorer.rolling_windows(scorer.encode(text), self.window)
        scores = scorer.score_tokens(windows)
        nll = Values([-score.log_likelihood for score in scores], [float(score.num_tokens) for score in scores])
        token = nll.estimate()
        per_word = sum(score.num_tokens for score in scores) / words
        word = math.exp(token.mean * per_word)
        derived = {
            "perplexity": perplexity(token),
            "word_perplexity": Estimate(word, word * token.stderr * per_word, token.n),
        }
        return Measured({"nll": nll}, derived, {"words": words})
