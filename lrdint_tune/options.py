"""Checks of single options, with errors that name the option, its value and what is expected."""

from __future__ import annotations

import math
from typing import Any

from lrdint_tune.errors import ConfigError


def choice(option: str, value: Any, valid: tuple[str, ...]) -> str:
    """``value``, if it is one of ``valid``. Raises ConfigError otherwise."""
    if value not in valid:
        raise ConfigError(f"{option}={value!r}: unknown; choose one of {', '.join(valid)}")
    return value


def flag(option: str, value: Any) -> bool:
    """``value``, if it is a bool. Raises ConfigError otherwise."""
    if not isinstance(value, bool):
        raise ConfigError(f"{option}={value!r}: must be true or false")
    return value


def positive_int(option: str, value: Any, hint: str = "") -> int:
    """``value``, if it is a whole number of at least 1. Raises ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{option}={value!r}: must be an integer of at least 1{hint}")
    return value


def number(option: str, value: Any, *, positive: bool = False, hint: str = "") -> float:
    """``value`` as a float, if it is a finite number, and above 0 where it must be. Raises ConfigError otherwise."""
    least = 0 if positive else -math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least < value < math.inf:
        kind = "a positive number" if positive else "a finite number"
        raise ConfigError(f"{option}={value!r}: must be {kind}{hint}")
    return float(value)


def dropout(option: str, value: Any) -> float:
    """``value``, if it is a number of at least 0 and below 1. Raises ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"{option}={value!r}: must be a number of at least 0 and below 1")
    return float(value)
