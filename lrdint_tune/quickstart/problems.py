"""Worked arithmetic word problems: small, deterministic, and made here, so that the quickstart needs no data set.

A row is ``{"question": str, "answer": str}``. The answer works the problem out one calculation to a line and ends in
``#### N``, the layout of GSM8K:

    Ben starts with 7 * 12 = 84 pencils.
    After the gift 84 - 30 = 54 pencils are left.
    #### 54

Training and held-out rows cannot overlap: a digest of (kind of problem, numbers) decides to which split a problem
belongs, so the same calculation never stands on both sides, not even with other names or in another wording.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import TypeVar

from lrdint_tune.quickstart.templates import NAMES, TEMPLATES, THINGS, Template

SPLITS = ("train", "heldout")
_HELDOUT_SHARE = 8  # one problem in so many belongs to the held-out split
_LARGEST = 9999  # results beyond this are arithmetic of another difficulty
_TRIES = 100_000  # draws without a new problem after which a kind counts as used up

_T = TypeVar("_T")


def generate(split: str, rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Make ``rows`` different problems of one split, the kinds in turn.

    The same arguments give the same rows on every platform and Python version: only ``random.Random.random`` is
    used, whose sequence Python guarantees.

    Args:
        split: ``"train"`` or ``"heldout"``.
        rows: how many rows.
        seed: another seed gives other rows, of the same split.

    Raises:
        ValueError: the split is unknown, or there are not so many different problems (some thousands per split).
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: unknown; one of {', '.join(SPLITS)}")
    rng = random.Random(f"{seed}/{split}")
    seen: set[str] = set()
    out: list[dict[str, str]] = []
    tries = 0
    while len(out) < rows:
        template = TEMPLATES[len(out) % len(TEMPLATES)]
        numbers = {name: _in_range(rng, *bounds) for name, bounds in template.numbers.items()}
        signature = f"{template.kind} {sorted(numbers.items())}"
        results = solve(template, numbers)
        if results is None or signature in seen or split_of(signature) != split:
            tries += 1
            if tries == _TRIES:
                raise ValueError(f"rows={rows}: split {split!r} has only {len(out)} different problems; ask for fewer")
            continue
        tries = 0
        seen.add(signature)
        out.append(_write(template, numbers, results, rng))
    return out


def split_of(signature: str) -> str:
    """The split that owns a problem, from a digest of its kind and numbers."""
    digest = hashlib.sha256(signature.encode()).digest()
    return "heldout" if digest[0] % _HELDOUT_SHARE == 0 else "train"


def solve(template: Template, numbers: dict[str, int]) -> dict[str, int] | None:
    """Results of all steps by name, or None where one is not a whole number from 1 to 9999."""
    values = dict(numbers)
    for step in template.steps:
        left, right = (value if isinstance(value, int) else values[value] for value in (step.left, step.right))
        if step.op == "/":
            result, remainder = divmod(left, right)
            if remainder:
                return None
        else:
            result = left + right if step.op == "+" else left - right if step.op == "-" else left * right
        if not 1 <= result <= _LARGEST:
            return None
        values[step.result] = result
    return values


def to_jsonl(rows: Sequence[dict[str, str]]) -> str:
    """The rows as JSON lines, ASCII, with a newline at the end."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write(template: Template, numbers: dict[str, int], values: dict[str, int], rng: random.Random) -> dict[str, str]:
    name = _pick(rng, NAMES)
    other = _pick(rng, [candidate for candidate in NAMES if candidate != name])
    words = {"name": name, "other": other, "thing": _pick(rng, THINGS)}
    question = _pick(rng, template.wordings).format(**words, **numbers)
    lines = []
    for step in template.steps:
        left, right = (value if isinstance(value, int) else values[value] for value in (step.left, step.right))
        equation = f"{left} {step.op} {right} = {values[step.result]}"
        lines.append(step.text.format(eq=equation, **words, **numbers))
    lines.append(f"#### {values[template.steps[-1].result]}")
    return {"question": question, "answer": "\n".join(lines)}


def _in_range(rng: random.Random, lowest: int, highest: int, step: int) -> int:
    return lowest + step * int(rng.random() * ((highest - lowest) // step + 1))


def _pick(rng: random.Random, options: Sequence[_T]) -> _T:
    return options[int(rng.random() * len(options))]
