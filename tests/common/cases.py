"""What the method suite runs over, and the one list of exceptions.

A case is a set of builder options. The product of methods and lambda forms comes first, each on MHA and GQA; then the
options of single methods, on GQA. Reference comparisons, identity at step 0, live gradients, causality, packing and
cached decoding all take their cases from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.common.layouts import LAYOUTS
from tests.common.reference.lam import DEFAULT_FORM, lambda_form

KV_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
"""Key/value heads beside TINY's four query heads."""
LAMBDAS = ("learned", "annealed", "exponential", "sigmoid", "gated", "fixed")
MAIN_LAYOUTS = ("causal", "packed", "left_padded", "right_padded")
STEP, ANNEAL_STEPS = 4, 10
"""Where the annealed schedule stands wherever lambda is to be away from 0."""

BASE: dict[str, dict[str, Any]] = {
    "none": {},
    "diff": {"rank": 3},
    "dint": {"rank": 3},
    "daa": {},
    "dex": {},
    "diffq": {},
    "diffk": {},
    "diffv": {},
    "difflora": {"rank": 3},
    "lmam": {"n": 5, "rank": 3, "scale": 0.5},  # shorter than some of the documents, longer than others
}
"""Sizes for tiny models; every other option is the method's default."""


@dataclass(frozen=True)
class MethodCase:
    """`options` go to the builder; `layouts` are those of the reference comparison. `selected`: dex's buffer, written
    by hand."""

    name: str
    options: dict[str, Any]
    heads: tuple[str, ...] = ("gqa",)
    layouts: tuple[str, ...] = MAIN_LAYOUTS
    selected: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def method(self) -> str:
        return self.options["method"]

    @property
    def lam(self) -> str | None:
        """The lambda form, None for a method that has none."""
        return lambda_form(self.options) if self.method in DEFAULT_FORM else None


def _product() -> list[MethodCase]:
    """Every method with every lambda form; the default form by leaving the option out, in every layout."""
    cases = []
    for method, base in BASE.items():
        for lam in LAMBDAS if method in DEFAULT_FORM else (None,):
            options = {"method": method, **base}
            default = lam is None or lam == DEFAULT_FORM[method]
            if not default:
                options["lam"] = lam
            if lam == "annealed":
                options["anneal_steps"] = ANNEAL_STEPS
            cases.append(
                MethodCase(
                    method if lam is None else f"{method}-{lam}",
                    options,
                    heads=("mha", "gqa", "mqa") if default else ("mha", "gqa"),
                    layouts=tuple(LAYOUTS) if default else MAIN_LAYOUTS,
                )
            )
    return cases


def _variants() -> list[MethodCase]:
    """Options of one method, each away from its default."""
    cases = []

    def add(name: str, **options: Any) -> None:
        method = name.split("-")[0]
        selected = options.pop("selected", None)
        heads = options.pop("heads_of", ("gqa",))
        options = {"method": method, **BASE[method], **options}
        if (options.get("lam") or DEFAULT_FORM.get(method)) == "annealed":
            options["anneal_steps"] = ANNEAL_STEPS
        cases.append(MethodCase(name, options, heads=heads, selected=selected))

    for method in ("diff", "dint"):
        add(f"{method}-full_rank", rank=None, secondary_scale="standard")
        add(f"{method}-full_rank-seed_scale", rank=None)
        add(f"{method}-shared_factors", factors="shared", secondary_scale="variance")
        add(f"{method}-scale", secondary_scale=0.37)
        add(f"{method}-noise_kv", noise_heads="kv", heads_of=("mha", "gqa", "mqa"))
        add(f"{method}-shared_keys", secondary_keys="shared")
        add(f"{method}-v2", rank=None, noise_heads="kv", secondary_keys="shared", lam="sigmoid")
        add(f"{method}-norm", sublayer_norm=True, lam="exponential")
        add(f"{method}-norm-learned", sublayer_norm=True, lam_init=0.25)
        add(f"{method}-add", combine="add", lam="annealed" if method == "diff" else "learned")
        add(f"{method}-learned-layer", lam_sharing="layer")
        add(f"{method}-annealed-layer", lam="annealed", lam_sharing="layer", lam_init=0.5)
        add(f"{method}-exponential-head", lam="exponential", lam_sharing="head", lam_init=-0.25)
        add(f"{method}-sigmoid-layer", lam="sigmoid", lam_sharing="layer")
        add(f"{method}-gated-layer", lam="gated", lam_sharing="layer")
        add(f"{method}-fixed-negative", lam="fixed", lam_init=-0.3125)
    add("dint-sequence", integral="sequence", allow_future_leak=True)
    add("daa-after", position="after")
    add("dex-layer", sharing="layer")
    add("dex-top_entropy", heads="top_entropy", selected=(0.0, 1.0, 1.0, 0.0))
    add("dex-top_entropy-layer", heads="top_entropy", sharing="layer", top_k=1, selected=(0.0, 0.0, 0.0, 1.0))
    add("dex-top_entropy-sigmoid", heads="top_entropy", lam="sigmoid", selected=(1.0, 0.0, 0.0, 1.0))
    for method in ("daa", "dex", "diffq", "diffk", "diffv"):
        add(f"{method}-add", combine="add")
        add(f"{method}-annealed-layer", lam_sharing="layer")
    add("diffv-exponential-head", lam="exponential", lam_sharing="head")
    add("diffv-sigmoid-layer", lam="sigmoid", lam_sharing="layer")
    add("difflora-alpha", lora_alpha=5, rank=2)
    add("difflora-no_positive", positive_lora=False)
    add("difflora-shared_keys", secondary_keys="shared", lam="learned")
    add("difflora-noise_kv", noise_heads="kv", heads_of=("mha", "gqa", "mqa"))
    add("difflora-norm", sublayer_norm=True)
    add("difflora-add", combine="add")
    add("lmam-defaults", n=128, rank=2, scale=1 / 255)
    add("lmam-one_row", n=1)
    add("lmam-wide", n=40)
    add("lmam-heads", heads=2, heads_of=("mha", "gqa"))
    add("lmam-one_head", heads=1)
    add("lmam-end", alignment="end")
    add("lmam-end-wide", alignment="end", n=40, heads=2)
    add("lmam-no_position", position="none")
    add("lmam-inside_softmax", inside_softmax=True, heads_of=("mha", "gqa", "mqa"))
    add("lmam-inside_softmax-end", inside_softmax=True, alignment="end", heads=2)
    add("lmam-softmax_map", softmax_map=True)
    add("lmam-softmax_map-end", softmax_map=True, alignment="end")
    return [*cases, *_full_rank()]


def _full_rank() -> list[MethodCase]:
    """The ablation without factors, which therefore takes neither a rank nor a position encoding."""
    common = {"method": "lmam", "scale": 0.5, "full_rank": True}
    return [
        MethodCase("lmam-full_rank", {**common, "n": 5}),
        MethodCase("lmam-full_rank-inside", {**common, "n": 7, "inside_softmax": True}),
        MethodCase("lmam-full_rank-end-heads", {**common, "n": 7, "alignment": "end", "heads": 2}),
    ]


CASES = [*_product(), *_variants()]
DEFAULTS = [case for case in CASES if len(case.layouts) > len(MAIN_LAYOUTS)]
"""Every method once, as it is without further options."""


def case_and_heads(cases: list[MethodCase] | None = None) -> list[Any]:
    """(case, heads) pairs, as arguments of `pytest.mark.parametrize`."""
    return [
        pytest.param(case, heads, id=f"{case}-{heads}")
        for case in (CASES if cases is None else cases)
        for heads in case.heads
    ]


# ------------------------------------------------------------------------------------------------------- exceptions
# Keyed by `option=value`, the lambda form spelled out as `lam=...` where it is the method's default.

NOT_THE_IDENTITY = {
    "lam=exponential": "starts near its lam_init, 0.8 - 0.6 exp(-0.3 layer) by default",
    "lam=sigmoid": "lies between 0 and 1, whatever the weights",
    "lam=fixed": "is 0.1 from the start by default (difflora's own form)",
    "sublayer_norm=True": "normalises the pretrained output",
    "softmax_map=True": "a softmax of zeros is not zero",
}
"""Cases whose first forward is another function than the pretrained model's."""

LEAKS = {"integral=sequence": "averages over later rows; it exists to measure that"}
"""Cases in which a row depends on later ones."""

SEES_THE_LENGTH = {
    **LEAKS,
    "alignment=end": "the map lies on the last rows, so a row knows how many follow it",
}
"""Cases in which a text that goes on gives other outputs than the text by itself."""

NO_CACHE = {
    "integral=sequence": "an earlier row's output depends on the rows to come",
    "alignment=end": "where the map lies depends on the final length",
}
"""Cases that refuse the KV cache."""


NO_FLEX = {"inside_softmax=True": "FlexAttention takes no dense bias"}
"""Cases that refuse the flex backend."""


def exception(table: dict[str, str], case: MethodCase) -> str | None:
    """The reason why `case` is in the table, None if it is not."""
    settings = {**case.options, **({"lam": case.lam} if case.lam else {})}
    return next((table[f"{k}={v}"] for k, v in settings.items() if f"{k}={v}" in table), None)


_HAS_LAMBDA = tuple(DEFAULT_FORM)
_LAMBDA_OPTIONS = ({"lam": "learned"}, {"lam_init": 0.1}, {"lam_sharing": "layer"}, {"anneal_steps": 5})
_NORMED = ("diff", "dint", "difflora")

REFUSED: list[tuple[dict[str, Any], str]] = [
    # Methods without a lambda, and options of other methods.
    *[({"method": m, **o}, "no such option") for m in ("none", "lmam") for o in _LAMBDA_OPTIONS],
    *[({"method": m, "combine": "add"}, "no such option") for m in ("none", "lmam")],
    *[
        ({"method": m, "sublayer_norm": True}, "no such option")
        for m in ("daa", "dex", "diffq", "diffk", "diffv", "lmam")
    ],
    *[
        ({"method": m, "noise_heads": "kv"}, "no such option")
        for m in ("daa", "dex", "diffq", "diffk", "diffv", "lmam")
    ],
    *[({"method": m, "secondary_keys": "shared"}, "no such option") for m in ("daa", "dex", "diffq", "diffk", "diffv")],
    *[({"method": m, "rank": 4}, "no such option") for m in ("none", "daa", "dex", "diffq", "diffk", "diffv")],
    ({"method": "difflora", "secondary_scale": "seed"}, "no such option"),
    ({"method": "difflora", "factors": "shared"}, "no such option"),
    # Lambda options that a form does not use.
    *[({"method": m, "lam": lam, "lam_init": 0.3}, "lam_init") for m in _HAS_LAMBDA for lam in ("sigmoid", "gated")],
    *[({"method": m, "lam": "fixed", "lam_sharing": "head"}, "lam_sharing") for m in _HAS_LAMBDA],
    *[({"method": m, "lam": "fixed", "anneal_steps": 5}, "anneal_steps") for m in _HAS_LAMBDA],
    # The norm's factor is 1 - lam_init, which a lambda of each token does not have.
    *[
        ({"method": m, "lam": lam, "sublayer_norm": True}, "sublayer_norm")
        for m in _NORMED
        for lam in ("sigmoid", "gated")
    ],
    # Values.
    *[
        ({"method": m, "combine": "add", **form}, "combine=.add..*mirror")
        for m in sorted(_HAS_LAMBDA)
        for form in ({"lam": "learned"}, {"lam": "gated"}, {"lam": "annealed", "lam_init": 0.0})
        if m != "dint"
    ],
    *[({"method": m, "lam_init": float("nan")}, "lam_init=nan") for m in _HAS_LAMBDA],
    *[({"method": m, "lam": ["learned"]}, "lam=.*unknown") for m in _HAS_LAMBDA],
    *[({"method": m, "combine": "minus"}, "combine.*minus.*subtract.*add") for m in _HAS_LAMBDA],
    *[({"method": m, "noise_heads": "all"}, "noise_heads.*all.*query.*kv") for m in _NORMED],
    *[({"method": m, "secondary_keys": "none"}, "secondary_keys.*none.*low_rank.*shared") for m in _NORMED],
    ({"method": "daa", "position": "middle"}, "position.*middle.*before.*after"),
    ({"method": "dex", "sharing": "group"}, "sharing.*group.*head.*layer"),
    ({"method": "dex", "heads": "some"}, "heads.*some.*all.*top_entropy"),
    ({"method": "dex", "top_k": 2}, "top_k"),  # without top_entropy
    ({"method": "dex", "heads": "top_entropy", "top_k": 5}, "top_k.*5"),  # of 4 heads
    ({"method": "dex", "heads": "top_entropy", "top_k": 0}, "top_k.*0"),
    ({"method": "difflora", "rank": None}, "rank"),
    ({"method": "difflora", "rank": 0}, "rank.*0"),
    ({"method": "difflora", "lora_alpha": 0}, "lora_alpha.*0"),
    ({"method": "lmam", "heads": 3}, "heads.*3"),  # does not divide 4
    ({"method": "lmam", "heads": 0}, "heads.*0"),
    ({"method": "lmam", "n": 0}, "n=0"),
    ({"method": "lmam", "rank": 0}, "rank.*0"),
    ({"method": "lmam", "alignment": "middle"}, "alignment.*middle.*start.*end"),
    ({"method": "lmam", "position": "rope"}, "position.*rope.*pe.*none"),
    ({"method": "lmam", "inside_softmax": True, "softmax_map": True}, "softmax_map|inside_softmax"),
    ({"method": "lmam", "full_rank": True, "rank": 5}, "rank=5"),
    ({"method": "lmam", "full_rank": True, "position": "none"}, "position=.none"),
]
"""Options that are refused by name, and a pattern of the message."""
