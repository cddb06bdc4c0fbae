"""The registry: a method's name in a config -> its class. The class's keyword-only arguments are the method's
options."""

from __future__ import annotations

import inspect
from typing import Any

from lrdint_tune.attention.methods.base import AttentionMethod
from lrdint_tune.attention.methods.daa import Daa
from lrdint_tune.attention.methods.dex import Dex
from lrdint_tune.attention.methods.diff import Diff
from lrdint_tune.attention.methods.diffk import DiffK
from lrdint_tune.attention.methods.difflora import DiffLora
from lrdint_tune.attention.methods.diffq import DiffQ
from lrdint_tune.attention.methods.diffv import DiffV
from lrdint_tune.attention.methods.dint import Dint
from lrdint_tune.attention.methods.lmam import Lmam
from lrdint_tune.attention.methods.none import NoMethod
from lrdint_tune.attention.shape import AttentionShape
from lrdint_tune.errors import ConfigError

METHODS: dict[str, type[AttentionMethod]] = {
    cls.name: cls for cls in (NoMethod, Diff, Dint, Daa, Dex, DiffQ, DiffK, DiffV, DiffLora, Lmam)
}


def method_options(method: str) -> dict[str, Any]:
    """The options of ``method`` with their defaults, own ones first.

    Raises:
        ConfigError: unknown method.
    """
    if method not in list(METHODS):
        raise ConfigError(f"method={method!r}: unknown; choose one of {', '.join(METHODS)}")
    options: dict[str, Any] = {}
    for cls in METHODS[method].__mro__:
        if "__init__" not in vars(cls) or cls is AttentionMethod:
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY:
                options.setdefault(p.name, p.default)  # a subclass may have another default
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return options


def build_method(method: str, shape: AttentionShape, **options: Any) -> AttentionMethod:
    """Build ``method`` for one attention layer.

    Raises:
        ConfigError: unknown method or option (the message lists the valid ones), or a bad option value.
    """
    valid = method_options(method)
    for name, value in options.items():
        if name not in valid:
            raise ConfigError(
                f"{name}={value!r}: method {method!r} has no such option; it has {', '.join(valid) or 'none'}"
            )
    build: Any = METHODS[method]
    return build(shape, **options)


__all__ = ["METHODS", "AttentionMethod", "build_method", "method_options"]
