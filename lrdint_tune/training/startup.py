"""What is checked and said about a model before a run, on the meta device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from lrdint_tune.attention import AttentionMethod
from lrdint_tune.errors import ConfigError
from lrdint_tune.export import plan_export
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.training.config import RunConfig, TrainConfig

log = logging.getLogger(__name__)


def check_outputs(model: LlamaDecoder, cfg: TrainConfig) -> None:
    """That the results can be written, and overwrite nothing.

    Raises:
        ConfigError: they would replace the pretrained weights or a foreign folder, or a tensor has no name in the
            exported files.
    """
    adapter, hf = (Path(cfg.output_dir) / name for name in ("adapter", "hf"))
    if Path(cfg.checkpointer["checkpoint_dir"]).resolve() == hf.resolve():
        raise ConfigError(
            f"output_dir={cfg.output_dir!r}: its hf folder is checkpointer.checkpoint_dir and would be "
            "replaced; choose another"
        )
    if not model.spec.leaks_future:  # a leaking model is not exported
        plan_export(model.state_dict(), model.spec, output_dirs=(adapter, hf))


def warn(methods: Sequence[AttentionMethod], cfg: RunConfig) -> None:
    """Log what a user may not expect of a model with these methods and this config."""
    for caution in sorted({method.caution for method in methods if method.caution is not None}):
        log.warning(caution)
    reasons = sorted({reason for method in methods for reason in method.differs_at_start()})
    if reasons:
        log.warning("the model does not begin as the pretrained one: %s", "; ".join(reasons))
    if cfg.calibration_batches is not None and not any(method.needs_calibration for method in methods):
        log.warning("calibration_batches has no effect: only heads=top_entropy calibrates")
