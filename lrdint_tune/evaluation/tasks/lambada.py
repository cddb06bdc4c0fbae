"""LAMBADA: the last word of a passage, as lm-eval's ``lambada_openai`` asks for it."""

from __future__ import annotations

from lrdint_tune.evaluation.measured import Measured, Values, perplexity
from lrdint_tune.evaluation.scoring import Scorer
from lrdint_tune.evaluation.tasks.items import Layout, Row, read_items


def _whole(row: Row) -> tuple[str, str]:
    context, word = row["text"].rsplit(" ", 1)
    return context, f" {word}"


# The hub's column, and those of llm-foundry's copy.
LAYOUTS = (
    Layout(("text",), _whole),
    Layout(("context", "continuation"), lambda row: (row["context"], f" {row['continuation'].lstrip(' ')}")),
)


def measure_lambada(scorer: Scorer, file: str, limit: int | None) -> Measured:
    """``acc``: every token of the word is the most likely one. ``perplexity``: ``exp`` of the mean over items of the
    word's NLL (of all its tokens together), its standard error by the delta method, where lm-eval resamples.

    Raises:
        ConfigError: see :func:`~lrdint_tune.evaluation.tasks.items.read_items`.
    """
    scores = scorer.score(read_items(file, LAYOUTS, limit))
    nll = Values([-score.log_likelihood for score in scores])
    return Measured(
        {"acc": Values([float(score.is_greedy) for score in scores]), "nll": nll},
        {"perplexity": perplexity(nll.estimate())},
    )
