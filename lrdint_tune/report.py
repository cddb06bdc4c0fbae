"""Attention before and after training as one HTML file that needs no network.

    tune run lrdint_tune/report --config configs/report.yaml run=output/run
    tune run lrdint_tune/report --config configs/report.yaml run=null before=<model folder> after=output/run/hf

Exit codes: lrdint_tune/exit_codes.py.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lrdint_tune.entry import recipe
from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.attention_record import as_record, look, read_record
from lrdint_tune.evaluation.config import ReportConfig
from lrdint_tune.evaluation.loading import load_model
from lrdint_tune.evaluation.probe_text import probe_tokens
from lrdint_tune.evaluation.report import Report, report_of_run, write_report
from lrdint_tune.exit_codes import DONE
from lrdint_tune.training.config import load_config
from lrdint_tune.training.world import resolve_device

log = logging.getLogger(__name__)


@recipe()
def recipe_main(cfg: DictConfig) -> int:
    """Write the report that a config file with ``key=value`` overrides describes; returns the exit code."""
    options = load_config(cfg, ReportConfig)
    if options.run is not None:
        report, folder = report_of_run(Path(options.run)), Path(options.run)
    else:
        assert options.before is not None and options.after is not None
        before, after = (_record(Path(place), options) for place in (options.before, options.after))
        names = (f"before: {Path(options.before).name}", f"after: {Path(options.after).name}")
        report, folder = Report("Attention before and after", before, after, names), Path()
    file = Path(options.output or folder / "report.html")
    try:
        write_report(report, file)
    except OSError as error:
        raise ConfigError(f"output={str(file)!r}: cannot be written ({error.strerror}); choose another") from None
    log.info("%s", file)
    return DONE


def _record(place: Path, options: ReportConfig) -> dict[str, Any]:
    if place.suffix == ".json":
        return read_record(place)
    device = resolve_device(options.device)
    loaded = load_model(
        place,
        base_model=None if (place / "config.json").is_file() else options.base_model,
        tokenizer=options.tokenizer,
        device=device,
        dtype=options.dtype,
    )
    limit = loaded.model.spec.max_seq_len
    if options.max_tokens > limit:
        raise ConfigError(f"max_tokens={options.max_tokens}: {place} takes {limit} tokens; lower it")
    tokens = probe_tokens(loaded.tokenizer, max_tokens=options.max_tokens, text_file=options.text_file)
    layers = look(loaded.model, tokens.to(device), top_k=options.top_k, heads_shown=options.heads_shown)
    return as_record(loaded.model, layers, num_tokens=tokens.shape[1], top_k=options.top_k)


if __name__ == "__main__":
    sys.exit(recipe_main())
