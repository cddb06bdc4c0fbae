"""The generated word problems: always the same, right, and split without overlap."""

import hashlib
import operator
import random
import re
from collections.abc import Callable

import pytest

from lrdint_tune.quickstart.prepare import ROWS
from lrdint_tune.quickstart.problems import SPLITS, generate, solve, split_of, to_jsonl
from lrdint_tune.quickstart.templates import NAMES, TEMPLATES, THINGS, Template

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

# What each text asks for, in one formula: independent of the steps of the worked answer.
MEANING: dict[str, Callable[..., float]] = {
    "gift from boxes": lambda boxes, each, given: boxes * each - given,
    "change in a shop": lambda count, price, paid: paid - count * price,
    "savings after weeks": lambda start, weekly, weeks, spent: start + weekly * weeks - spent,
    "weeks to a goal": lambda price, start, weekly: (price - start) / weekly,
    "sharing after eating": lambda trays, each, eaten, friends: (trays * each - eaten) / friends,
    "two legs of a journey": lambda fast, fast_hours, slow, slow_hours: fast * fast_hours + slow * slow_hours,
    "fence around a garden": lambda long, wide, price: 2 * (long + wide) * price,
    "lawn around a pond": lambda long, wide, pond, bag: (long * wide - pond) / bag,
    "pages to read": lambda pages, first: pages - 3 * first,
    "ages in the future": lambda age, times, years: (age + years) + (age * times + years),
    "pay with overtime": lambda hours, wage, extra, extra_wage: hours * wage + extra * extra_wage,
    "buses for a trip": lambda pupils, adults, seats, rent: (pupils + adults) / seats * rent,
    "theatre tickets": lambda adults, full, children, half: adults * full + children * half,
    "eggs by the box": lambda hens, days, size, price: hens * days / size * price,
    "filling a tank": lambda tank, inflow, outflow: tank / (inflow - outflow),
    "reduced price": lambda price, off, count, money: money - (price - off) * count,
    "temperature": lambda start, drop, hours, rise: start - drop * hours + rise,
    "library shelves": lambda shelves, each, lent, back: shelves * each - lent + back,
    "three collectors": lambda own, more: own + (own + more) + 2 * (own + more),
    "scaling a recipe": lambda serves, cups, guests, price: guests / serves * cups * price,
    "average of three tests": lambda first, second, third: (first + second + third) / 3,
    "parking house": lambda floors, each, free, fee: (floors * each - free) * fee,
    "percentage of a school": lambda pupils, percent, ill: pupils * percent / 100 - ill,
    "minutes of work": lambda hours, minutes, pause, piece: (60 * hours + minutes - pause) / piece,
}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {split: generate(split, count) for split, count in ROWS.items()}


def test_rows_are_the_same_everywhere(rows):
    digests = {split: hashlib.sha256(to_jsonl(part).encode()).hexdigest() for split, part in rows.items()}
    assert digests == {
        "train": "63de90accabc2eeb2ea9c8dc928916c9d03ee9c779db676c9d396cbae5541e82",
        "heldout": "85d1152d32722ee099f249877e1f1f5e236935c6f76ccfeeff05697639d64f89",
    }


def test_fewer_rows_are_the_first_rows(rows):
    assert generate("train", 30) == rows["train"][:30]
    assert generate("train", 30, seed=1) != rows["train"][:30]


def test_splits_do_not_overlap(rows):
    """Compared without names and things: neither a question nor a worked answer may stand on both sides."""

    def stripped(text: str) -> str:
        return re.sub("|".join([*NAMES, *THINGS]), "*", text)

    for field in ("question", "answer"):
        train, heldout = ({stripped(row[field]) for row in rows[split]} for split in SPLITS)
        assert not train & heldout
    assert len({row["question"] for row in rows["train"]}) == len(rows["train"]) == 2000
    assert len({row["question"] for row in rows["heldout"]}) == len(rows["heldout"]) == 100


def test_every_problem_belongs_to_one_split():
    shares = [split_of(f"problem {i}") for i in range(2000)]
    assert set(shares) == set(SPLITS)
    assert 0.08 < shares.count("heldout") / len(shares) < 0.17


def test_worked_answers_are_right(rows):
    for row in rows["train"] + rows["heldout"]:
        *lines, last = row["answer"].split("\n")
        assert len(lines) >= 2
        for line in lines:
            ((left, sign, right, result),) = EQUATION.findall(line)
            assert OPERATORS[sign](int(left), int(right)) == int(result), line
        assert last == f"#### {result}"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.kind)
def test_the_steps_answer_the_question(template: Template):
    rng = random.Random(0)
    solved = 0
    for _ in range(3000):
        numbers = {name: rng.randrange(low, high + 1, step) for name, (low, high, step) in template.numbers.items()}
        values = solve(template, numbers)
        if values is not None:
            solved += 1
            assert values[template.steps[-1].result] == MEANING[template.kind](**numbers)
    assert solved > 20


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.kind)
def test_every_wording_gives_every_number(template: Template):
    for wording in template.wordings:
        assert all(f"{{{name}}}" in wording for name in template.numbers)


def test_steps_that_do_not_come_out_even_are_rejected():
    (template,) = (template for template in TEMPLATES if template.kind == "average of three tests")
    assert solve(template, {"first": 50, "second": 50, "third": 51}) is None


def test_bad_requests():
    with pytest.raises(ValueError, match="split='test': unknown; one of train, heldout"):
        generate("test", 1)
    with pytest.raises(ValueError, match="ask for fewer"):
        generate("heldout", 10**6)
