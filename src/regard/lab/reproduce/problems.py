"""Word problems made from templates: short reasoning for a small model, with no data set."""

from __future__ import annotations

import random

_NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry"),
    *("Iris", "Jack", "Karen", "Liam", "Mia", "Noah", "Olivia", "Paul"),
)
_THINGS = ("apples", "books", "pencils", "marbles", "stamps", "cookies", "coins", "shells")
_PLACES = ("shop", "market", "school", "farm", "library", "station")
_TEMPLATES = (
    "{a} has {n} {t}. {a} buys {m} bags with {k} {t} each and gives {j} {t} to {b}. How many {t} "
    "does {a} have now?",
    "A {p} sells {t} for {k} dollars each. {a} buys {m} of them and pays with {big} dollars. How "
    "much change does {a} get?",
    "{a} reads {k} pages a day for {m} days, and {b} reads {j} pages a day for {n} days. Who reads "
    "more pages, and by how many?",
    "There are {big} {t} in a {p}. On Monday {n} are sold, and on Tuesday {k} more than on "
    "Monday. How many {t} are left?",
    "{a} walks {k} kilometers each morning and {j} kilometers each evening. How far does {a} walk "
    "in {m} days, and how much farther is that than {n} kilometers?",
    "{a}, {b} and {c} share {big} {t}. {a} takes {n} and {b} takes {k} more than {a}. How many {t} "
    "are left for {c}?",
)
ASK = " Think step by step and explain every step before you give the answer."


def problems(count: int, seed: int = 0) -> list[str]:
    """So many problems, the same for the same seed, the templates taking turns.

    >>> problems(2, seed=1) == problems(3, seed=1)[:2]
    True
    """
    draw = random.Random(seed)
    tasks = []
    for number in range(count):
        a, b, c = draw.sample(_NAMES, 3)
        filled = _TEMPLATES[number % len(_TEMPLATES)].format(
            a=a,
            b=b,
            c=c,
            t=draw.choice(_THINGS),
            p=draw.choice(_PLACES),
            n=draw.randint(11, 29),
            m=draw.randint(3, 6),
            k=draw.randint(4, 9),
            j=draw.randint(2, 8),
            big=draw.randint(90, 160),
        )
        tasks.append(filled + ASK)
    return tasks
