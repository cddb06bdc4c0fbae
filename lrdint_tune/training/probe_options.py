"""The ``attention_probe`` section of a config."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lrdint_tune.errors import ConfigError
from lrdint_tune.options import positive_int


@dataclass(frozen=True)
class ProbeOptions:
    """The keys of the ``attention_probe`` section.

    Args:
        every_n_steps: optimizer steps from one look to the next; there is one before the first and one after the last
            step, too.
        max_tokens: of the text, at most.
        top_k: how many weights of a row count as signal in ``noise_to_signal``.
        text_file: UTF-8 text; None takes the built-in one.
        heads_shown: heads whose heat maps are kept, in three layers.
    """

    every_n_steps: int = 10
    max_tokens: int = 256
    top_k: int = 8
    text_file: str | None = None
    heads_shown: int = 4

    def __post_init__(self) -> None:
        for key in ("every_n_steps", "max_tokens", "top_k"):
            positive_int(f"attention_probe.{key}", getattr(self, key))
        if self.heads_shown != 0 or isinstance(self.heads_shown, bool):
            positive_int("attention_probe.heads_shown", self.heads_shown, ", or 0")
        if self.text_file is not None and not isinstance(self.text_file, str):
            raise ConfigError(f"attention_probe.text_file={self.text_file!r}: must be a path, or null")


def check_probe(section: dict[str, Any] | None, *, context_size: int, tensor_size: int) -> ProbeOptions | None:
    """The options that an ``attention_probe`` section gives; no section, no probe.

    Raises:
        ConfigError: an unknown key, a bad value, or processes that share a sequence or a layer.
    """
    if section is None:
        return None
    valid = [f.name for f in fields(ProbeOptions)]
    for key in section:
        if key not in valid:
            raise ConfigError(f"attention_probe: unknown key {key}={section[key]!r}; valid keys: {', '.join(valid)}")
    for name, size in (("context_parallel_dim", context_size), ("tensor_parallel_dim", tensor_size)):
        if size > 1:
            raise ConfigError(
                f"attention_probe: is not there for {name}={size}, no process has whole maps; remove the section, or "
                "look at the exported model with lrdint_tune/report"
            )
    return ProbeOptions(**section)
