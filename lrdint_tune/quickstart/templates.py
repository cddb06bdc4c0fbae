"""The texts of the worked word problems: 24 kinds, two wordings each. How they are filled in is in problems.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One calculation of the worked answer: ``result = left op right``.

    ``left`` and ``right`` name numbers of the problem or earlier results, or are constants. ``{eq}`` in ``text`` is
    the written calculation, for instance ``4 * 6 = 24``.
    """

    result: str
    left: str | int
    op: str
    right: str | int
    text: str


@dataclass(frozen=True)
class Template:
    """One kind of problem. ``numbers`` gives each number's (lowest, highest, step); the last step is the answer.

    The wordings may use the numbers, ``{name}`` and ``{other}`` (two people) and ``{thing}`` (a plural noun).
    """

    kind: str
    numbers: dict[str, tuple[int, int, int]]
    wordings: tuple[str, str]
    steps: tuple[Step, ...]


NAMES = (
    "Amara Ben Chloe Dmitri Elena Farid Grace Hiro Ines Jonas Kofi Leila Mateo Nadia Oscar Priya Quinn Rosa Samuel"
    " Tara Umar Vera Wei Yusuf"
).split()
THINGS = (
    "pencils marbles stickers apples buttons postcards shells candles badges cups plums ribbons notebooks beads stamps"
    " erasers"
).split()

TEMPLATES = (
    Template(
        "gift from boxes",
        {"boxes": (3, 15, 1), "each": (4, 24, 1), "given": (5, 60, 1)},
        (
            "{name} buys {boxes} boxes of {thing} with {each} {thing} in every box and gives {given} of them to"
            " {other}. How many {thing} does {name} have left?",
            "There are {each} {thing} in a box. {name} opens {boxes} boxes and hands {given} {thing} to {other}."
            " How many {thing} remain with {name}?",
        ),
        (
            Step("total", "boxes", "*", "each", "{name} starts with {eq} {thing}."),
            Step("left", "total", "-", "given", "After the gift {eq} {thing} are left."),
        ),
    ),
    Template(
        "change in a shop",
        {"count": (2, 12, 1), "price": (3, 19, 1), "paid": (20, 200, 10)},
        (
            "A pack of {thing} costs {price} dollars. {name} takes {count} packs and pays with {paid} dollars. How"
            " many dollars of change does {name} get?",
            "{name} pays {paid} dollars for {count} packs of {thing} at {price} dollars a pack. How much change in"
            " dollars does the shop owe {name}?",
        ),
        (
            Step("cost", "count", "*", "price", "The packs cost {eq} dollars."),
            Step("change", "paid", "-", "cost", "The change is {eq} dollars."),
        ),
    ),
    Template(
        "savings after weeks",
        {"start": (10, 150, 5), "weekly": (4, 30, 1), "weeks": (3, 20, 1), "spent": (5, 90, 5)},
        (
            "{name} has {start} dollars and saves {weekly} dollars every week for {weeks} weeks. Then {name} spends"
            " {spent} dollars on a present for {other}. How many dollars does {name} have now?",
            "For {weeks} weeks {name} puts aside {weekly} dollars a week, on top of {start} dollars saved before. A"
            " present for {other} takes {spent} dollars. How many dollars are left?",
        ),
        (
            Step("saved", "weekly", "*", "weeks", "In that time {name} saves {eq} dollars."),
            Step("total", "start", "+", "saved", "With the money from before that makes {eq} dollars."),
            Step("left", "total", "-", "spent", "After the present {eq} dollars are left."),
        ),
    ),
    Template(
        "weeks to a goal",
        {"price": (80, 400, 10), "start": (10, 90, 5), "weekly": (5, 25, 1)},
        (
            "A bicycle costs {price} dollars. {name} already has {start} dollars and earns {weekly} dollars a week. In"
            " how many weeks can {name} buy the bicycle?",
            "{name} wants a guitar for {price} dollars, owns {start} dollars and can set aside {weekly} dollars each"
            " week. How many weeks does it take to have enough?",
        ),
        (
            Step("missing", "price", "-", "start", "{name} still needs {eq} dollars."),
            Step("weeks", "missing", "/", "weekly", "At {weekly} dollars a week that takes {eq} weeks."),
        ),
    ),
    Template(
        "sharing after eating",
        {"trays": (2, 9, 1), "each": (6, 24, 1), "eaten": (2, 12, 1), "friends": (3, 12, 1)},
        (
            "{name} bakes {trays} trays of {each} biscuits. The family eats {eaten} of them, and the rest is shared"
            " equally among {friends} friends. How many biscuits does each friend get?",
            "From {trays} trays with {each} biscuits each, {eaten} biscuits are eaten at once. {name} divides the"
            " others equally between {friends} friends. How many biscuits is that for each of them?",
        ),
        (
            Step("total", "trays", "*", "each", "There are {eq} biscuits."),
            Step("rest", "total", "-", "eaten", "Once some are eaten, {eq} biscuits remain."),
            Step("share", "rest", "/", "friends", "Each friend gets {eq} biscuits."),
        ),
    ),
    Template(
        "two legs of a journey",
        {"fast": (60, 140, 5), "fast_hours": (2, 7, 1), "slow": (20, 55, 5), "slow_hours": (2, 6, 1)},
        (
            "A train drives {fast_hours} hours at {fast} kilometres an hour and then {slow_hours} hours at {slow}"
            " kilometres an hour. How many kilometres does it cover?",
            "{name} travels at {fast} kilometres an hour for {fast_hours} hours and, on a smaller road, at {slow}"
            " kilometres an hour for {slow_hours} hours. How long is the whole way in kilometres?",
        ),
        (
            Step("first", "fast", "*", "fast_hours", "The first part is {eq} kilometres long."),
            Step("second", "slow", "*", "slow_hours", "The second part is {eq} kilometres long."),
            Step("total", "first", "+", "second", "Together they make {eq} kilometres."),
        ),
    ),
    Template(
        "fence around a garden",
        {"long": (8, 40, 1), "wide": (3, 20, 1), "price": (2, 15, 1)},
        (
            "A garden is {long} metres by {wide}. What does a fence all around cost at {price} dollars a metre?",
            "{name} fences a rectangle of {long} by {wide} metres. Every metre of the fence is {price} dollars. How"
            " many dollars does {name} pay?",
        ),
        (
            Step("half", "long", "+", "wide", "One long and one short side measure {eq} metres."),
            Step("around", "half", "*", 2, "The way around is {eq} metres."),
            Step("cost", "around", "*", "price", "The fence costs {eq} dollars."),
        ),
    ),
    Template(
        "lawn around a pond",
        {"long": (10, 40, 1), "wide": (5, 25, 1), "pond": (6, 90, 1), "bag": (4, 20, 1)},
        (
            "A yard is {long} metres long and {wide} metres wide. A pond covers {pond} square metres, and the rest"
            " becomes lawn. One bag of seed is enough for {bag} square metres. How many bags are needed?",
            "{name} sows grass on a plot of {long} by {wide} metres, except on a pond of {pond} square metres. A bag of"
            " seed covers {bag} square metres. How many bags does {name} use?",
        ),
        (
            Step("area", "long", "*", "wide", "The whole area is {eq} square metres."),
            Step("lawn", "area", "-", "pond", "The lawn covers {eq} square metres."),
            Step("bags", "lawn", "/", "bag", "That takes {eq} bags."),
        ),
    ),
    Template(
        "pages to read",
        {"pages": (120, 480, 4), "first": (10, 90, 1)},
        (
            "{name} reads {first} pages of a book of {pages} pages on Monday and twice as many on Tuesday. How many"
            " pages are left?",
            "A book has {pages} pages. On the first day {name} reads {first} pages, on the second day twice that."
            " How many pages does {name} still have to read?",
        ),
        (
            Step("second", "first", "*", 2, "On the second day {name} reads {eq} pages."),
            Step("read", "first", "+", "second", "In both days together {name} reads {eq} pages."),
            Step("left", "pages", "-", "read", "There are {eq} pages left."),
        ),
    ),
    Template(
        "ages in the future",
        {"age": (4, 30, 1), "times": (2, 3, 1), "years": (2, 20, 1)},
        (
            "{name} is {age} years old, and {other} is {times} times as old. How old will the two be together in"
            " {years} years?",
            "{other} is {times} times as old as {name}, who is {age}. What is the sum of their ages {years} years"
            " from now?",
        ),
        (
            Step("older", "age", "*", "times", "{other} is {eq} years old."),
            Step("now", "age", "+", "older", "Today their ages add up to {eq}."),
            Step("grow", "years", "*", 2, "Both grow older, which adds {eq} years."),
            Step("later", "now", "+", "grow", "Their ages will then add up to {eq}."),
        ),
    ),
    Template(
        "pay with overtime",
        {"hours": (10, 40, 1), "wage": (11, 30, 1), "extra": (2, 12, 1), "extra_wage": (31, 50, 1)},
        (
            "{name} works {hours} hours at {wage} dollars an hour and {extra} more hours at {extra_wage} dollars an"
            " hour. How many dollars does {name} earn?",
            "An hour of normal work pays {name} {wage} dollars, an hour of overtime {extra_wage} dollars. What is the"
            " pay in dollars for {hours} normal hours and {extra} hours of overtime?",
        ),
        (
            Step("normal", "hours", "*", "wage", "The normal hours pay {eq} dollars."),
            Step("over", "extra", "*", "extra_wage", "The other hours pay {eq} dollars."),
            Step("total", "normal", "+", "over", "In all that is {eq} dollars."),
        ),
    ),
    Template(
        "buses for a trip",
        {"pupils": (60, 400, 1), "adults": (4, 30, 1), "seats": (20, 60, 2), "rent": (80, 300, 10)},
        (
            "A school takes {pupils} pupils and {adults} teachers on a trip. Each bus has {seats} seats, and all seats"
            " are taken. A bus costs {rent} dollars. What do the buses cost in dollars?",
            "{pupils} children and {adults} adults fill buses of {seats} seats down to the last seat. The rent of a"
            " bus is {rent} dollars. How many dollars is the rent of all the buses?",
        ),
        (
            Step("people", "pupils", "+", "adults", "The number of people is {eq}."),
            Step("buses", "people", "/", "seats", "They need {eq} buses."),
            Step("cost", "buses", "*", "rent", "The buses cost {eq} dollars."),
        ),
    ),
    Template(
        "theatre tickets",
        {"adults": (2, 40, 1), "full": (12, 30, 1), "children": (3, 60, 1), "half": (4, 11, 1)},
        (
            "A theatre sells {adults} tickets for adults at {full} dollars and {children} tickets for children at"
            " {half} dollars. How many dollars does it take in?",
            "Tickets are {full} dollars for adults and {half} dollars for children. What do {adults} adults and"
            " {children} children pay together, in dollars?",
        ),
        (
            Step("big", "adults", "*", "full", "The adults pay {eq} dollars."),
            Step("small", "children", "*", "half", "The children pay {eq} dollars."),
            Step("total", "big", "+", "small", "Together that is {eq} dollars."),
        ),
    ),
    Template(
        "eggs by the box",
        {"hens": (6, 60, 1), "days": (2, 14, 1), "size": (6, 12, 2), "price": (2, 6, 1)},
        (
            "On {name}'s farm {hens} hens lay one egg a day each. After {days} days {name} packs all the eggs in boxes"
            " of {size} and sells them for {price} dollars a box. How many dollars does {name} get?",
            "{hens} hens each lay one egg every day. {name} sells the eggs of {days} days in boxes of {size} eggs at"
            " {price} dollars a box. What do all the boxes bring in dollars?",
        ),
        (
            Step("eggs", "hens", "*", "days", "The hens lay {eq} eggs."),
            Step("boxes", "eggs", "/", "size", "They fill {eq} boxes."),
            Step("money", "boxes", "*", "price", "The boxes bring {eq} dollars."),
        ),
    ),
    Template(
        "filling a tank",
        {"tank": (60, 900, 10), "inflow": (8, 60, 1), "outflow": (2, 40, 1)},
        (
            "A tank holds {tank} litres. Each minute {inflow} litres flow in and {outflow} litres run out. After how"
            " many minutes is the empty tank full?",
            "{name} fills an empty tank of {tank} litres with {inflow} litres of water a minute, but {outflow} litres"
            " a minute are lost through a leak. How many minutes does it take to fill the tank?",
        ),
        (
            Step("net", "inflow", "-", "outflow", "Each minute the tank gains {eq} litres."),
            Step("minutes", "tank", "/", "net", "It is full after {eq} minutes."),
        ),
    ),
    Template(
        "reduced price",
        {"price": (12, 60, 1), "off": (2, 20, 1), "count": (2, 15, 1), "money": (50, 600, 10)},
        (
            "A ticket costs {price} dollars, and a group gets {off} dollars off every ticket. A group of {count} has"
            " {money} dollars. How many dollars are left after buying {count} tickets?",
            "{name} buys {count} lamps that cost {price} dollars before a reduction of {off} dollars each. How many of"
            " {money} dollars does {name} keep?",
        ),
        (
            Step("reduced", "price", "-", "off", "The reduced price is {eq} dollars."),
            Step("cost", "reduced", "*", "count", "Together they cost {eq} dollars."),
            Step("left", "money", "-", "cost", "There are {eq} dollars left."),
        ),
    ),
    Template(
        "temperature",
        {"start": (18, 70, 1), "drop": (2, 8, 1), "hours": (2, 9, 1), "rise": (2, 25, 1)},
        (
            "An oven stands at {start} degrees. It cools by {drop} degrees an hour for {hours} hours and is then warmed"
            " by {rise} degrees. How many degrees does it show?",
            "Water of {start} degrees loses {drop} degrees every hour. After {hours} hours {name} heats it up by {rise}"
            " degrees. How warm is the water in degrees?",
        ),
        (
            Step("fall", "drop", "*", "hours", "The temperature falls by {eq} degrees."),
            Step("low", "start", "-", "fall", "That leaves {eq} degrees."),
            Step("end", "low", "+", "rise", "After warming it is {eq} degrees."),
        ),
    ),
    Template(
        "library shelves",
        {"shelves": (4, 30, 1), "each": (12, 48, 1), "lent": (10, 200, 1), "back": (5, 90, 1)},
        (
            "A library has {shelves} shelves with {each} books each. In March {lent} books are lent out, and {back} of"
            " them come back. How many books are in the library then?",
            "{name} counts {shelves} shelves of {each} books. Readers borrow {lent} books and bring {back} of these"
            " back. How many books stand on the shelves now?",
        ),
        (
            Step("total", "shelves", "*", "each", "The library owns {eq} books."),
            Step("out", "lent", "-", "back", "Still away are {eq} books."),
            Step("there", "total", "-", "out", "In the library there are {eq} books."),
        ),
    ),
    Template(
        "three collectors",
        {"own": (5, 60, 1), "more": (2, 40, 1)},
        (
            "{name} has {own} {thing}. {other} has {more} more than {name}, and a cousin has twice as many as {other}."
            " How many {thing} do the three have together?",
            "{other} owns {more} {thing} more than {name}, who owns {own}. Their teacher owns twice as many as {other}."
            " How many {thing} are there in all?",
        ),
        (
            Step("second", "own", "+", "more", "{other} has {eq} {thing}."),
            Step("third", "second", "*", 2, "Twice as many is {eq} {thing}."),
            Step("pair", "own", "+", "second", "{name} and {other} have {eq} {thing}."),
            Step("total", "pair", "+", "third", "All three have {eq} {thing}."),
        ),
    ),
    Template(
        "scaling a recipe",
        {"serves": (2, 8, 1), "cups": (2, 9, 1), "guests": (10, 96, 1), "price": (2, 7, 1)},
        (
            "A recipe for {serves} people needs {cups} cups of rice. {name} cooks it for {guests} people. A cup of rice"
            " costs {price} dollars. What does the rice cost in dollars?",
            "{name} needs {cups} cups of flour for every {serves} guests, and {guests} guests are coming. If a cup"
            " costs {price} dollars, how many dollars does the flour cost?",
        ),
        (
            Step("times", "guests", "/", "serves", "The recipe is made {eq} times."),
            Step("need", "times", "*", "cups", "That takes {eq} cups."),
            Step("cost", "need", "*", "price", "The cups cost {eq} dollars."),
        ),
    ),
    Template(
        "average of three tests",
        {"first": (40, 100, 1), "second": (40, 100, 1), "third": (40, 100, 1)},
        (
            "{name} scores {first}, {second} and {third} points in three tests. What is the average score?",
            "In three games {name} wins {first}, {second} and {third} points. What is that per game on average?",
        ),
        (
            Step("two", "first", "+", "second", "The first two make {eq} points."),
            Step("all", "two", "+", "third", "All three make {eq} points."),
            Step("average", "all", "/", 3, "The average is {eq} points."),
        ),
    ),
    Template(
        "parking house",
        {"floors": (2, 9, 1), "each": (20, 80, 1), "free": (5, 90, 1), "fee": (2, 9, 1)},
        (
            "A parking house has {floors} floors with {each} spaces each, and {free} spaces are free. Every parked car"
            " pays {fee} dollars. How many dollars do the cars pay together?",
            "On {floors} floors there is room for {each} cars each. All but {free} spaces are taken, at {fee} dollars a"
            " car. How many dollars does that bring?",
        ),
        (
            Step("spaces", "floors", "*", "each", "There are {eq} spaces."),
            Step("cars", "spaces", "-", "free", "Taken are {eq} of them."),
            Step("money", "cars", "*", "fee", "The cars pay {eq} dollars."),
        ),
    ),
    Template(
        "percentage of a school",
        {"pupils": (200, 1900, 100), "percent": (5, 95, 5), "ill": (1, 60, 1)},
        (
            "Of {pupils} pupils, {percent} percent come by bus. On Friday {ill} of those are ill and stay at home. How"
            " many pupils come by bus on Friday?",
            "{percent} percent of the {pupils} seats in a hall are sold, but {ill} of the buyers do not come. How many"
            " seats are taken?",
        ),
        (
            Step("one", "pupils", "/", 100, "One percent is {eq}."),
            Step("part", "one", "*", "percent", "So {percent} percent are {eq}."),
            Step("there", "part", "-", "ill", "Without those who are missing it is {eq}."),
        ),
    ),
    Template(
        "minutes of work",
        {"hours": (2, 9, 1), "minutes": (5, 55, 5), "pause": (10, 60, 5), "piece": (3, 15, 1)},
        (
            "{name} is in the workshop for {hours} hours and {minutes} minutes, with a break of {pause} minutes. Making"
            " one chair leg takes {piece} minutes. How many legs does {name} make?",
            "A shift lasts {hours} hours and {minutes} minutes and has a break of {pause} minutes. A machine needs"
            " {piece} minutes for a part and rests during the break. How many parts are made in a shift?",
        ),
        (
            Step("whole", "hours", "*", 60, "The full hours are {eq} minutes."),
            Step("total", "whole", "+", "minutes", "The whole time is {eq} minutes."),
            Step("work", "total", "-", "pause", "Without the break it is {eq} minutes."),
            Step("made", "work", "/", "piece", "That is enough for {eq} pieces."),
        ),
    ),
)
