"""Tasks with exact rewards, for reinforcement learning: prompts, worked solutions, and the score.

>>> task = environment("arithmetic")
>>> one = task.sample(1, seed=0)[0]
>>> task.reward(one, one.solution), task.reward(one, "answer: none")
(1.0, 0.0)
"""

from __future__ import annotations

import ast
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from regard.errors import InputError, nearest

MARK = "answer:"
LONGEST = 200  # characters of an expression
_OPERATORS: dict[type, tuple[str, Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: ("+", lambda a, b: a + b),
    ast.Sub: ("-", lambda a, b: a - b),
    ast.Mult: ("*", lambda a, b: a * b),
    ast.Div: ("/", lambda a, b: a / b),
}


@dataclass(frozen=True)
class Task:
    """One question.

    Attributes:
        prompt: what the model reads.
        solution: a worked solution, for supervised training; "" where there is none.
        goal: what the reward needs to know.
    """

    prompt: str
    solution: str
    goal: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Environment:
    """Tasks of one kind: `sample(count, seed)` draws, `reward(task, completion)` is exact."""

    name: str
    sample: Callable[..., list[Task]]
    reward: Callable[[Task, str], float]


def answer_of(completion: str) -> str:
    """What stands behind the last "answer:" of a completion, "" where there is none.

    >>> answer_of("4*2=8 answer: 3+4*2")
    '3+4*2'
    """
    _, mark, answer = completion.rpartition(MARK)
    lines = answer.strip().splitlines()
    return lines[0].strip() if mark and lines else ""


def value_of(expression: str) -> tuple[Fraction, list[int]]:
    """Value and numbers of a sum of whole numbers with + - * / and brackets; nothing is executed.

    >>> value_of("(3+4)*2")
    (Fraction(14, 1), [3, 4, 2])

    Raises:
        ValueError: anything else.
    """
    if len(expression) > LONGEST:
        raise ValueError("too long")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"no expression: {expression[:40]!r}") from None
    used: list[int] = []

    def value(node: Any) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Div) and not right:
                raise ValueError("division by 0")
            return _OPERATORS[type(node.op)][1](left, right)
        raise ValueError(f"no sum of whole numbers: {expression[:40]!r}")

    return value(tree.body), used


# -- countdown ---------------------------------------------------------------------------------
def solve(numbers: Sequence[int], target: int) -> tuple[str, str] | None:
    """Steps and expression that make the target of all numbers, left to right; None if none does.

    >>> solve([3, 4, 2], 14)
    ('3+4=7 7*2=14', '(3+4)*2')
    """
    for order in itertools.permutations(numbers):
        for signs in itertools.product("+-*", repeat=len(order) - 1):
            total, text, steps = order[0], str(order[0]), []
            for sign, n in zip(signs, order[1:]):
                new = total + n if sign == "+" else total - n if sign == "-" else total * n
                steps.append(f"{total}{sign}{n}={new}")
                far = sign == "*" and not text.isdigit()
                text = f"({text}){sign}{n}" if far else f"{text}{sign}{n}"
                total = new
            if total == target and not any("--" in s or s.startswith("-") for s in steps):
                return " ".join(steps), text
    return None


def countdown(count: int, seed: int = 0, *, numbers: int = 3, instruct: bool = False) -> list[Task]:
    """Make a target of two or three numbers, each used once."""
    make, tasks = random.Random(seed), list[Task]()
    while len(tasks) < count:
        drawn = [make.randint(1, 9) for _ in range(make.randint(2, numbers))]
        signs = [make.choice("+-*") for _ in drawn[1:]]
        target = drawn[0]
        for sign, n in zip(signs, drawn[1:]):
            target = target + n if sign == "+" else target - n if sign == "-" else target * n
        if not 0 < target < 100:
            continue
        make.shuffle(drawn)
        found = solve(drawn, target)
        if found is None:
            continue
        listed = " ".join(map(str, drawn))
        prompt = f"{listed} make {target}: "
        if instruct:
            prompt = (
                f"Make {target} from the numbers {listed} with + - * and brackets, each number "
                f'once. Work it out, then end with "{MARK}" and the expression.'
            )
        tasks.append(
            Task(prompt, f"{found[0]} {MARK} {found[1]}", {"numbers": drawn, "target": target})
        )
    return tasks


def _countdown_reward(task: Task, completion: str) -> float:
    try:
        value, used = value_of(answer_of(completion))
    except ValueError:
        return 0.0
    right = value == task.goal["target"] and sorted(used) == sorted(task.goal["numbers"])
    return float(right)


# -- arithmetic --------------------------------------------------------------------------------
def arithmetic(count: int, seed: int = 0, *, instruct: bool = False) -> list[Task]:
    """Sums of three numbers, worked out from left to right."""
    make, tasks = random.Random(seed), []
    for _ in range(count):
        a, b, c = (make.randint(1, 20) for _ in range(3))
        first, second = make.choice("+-"), make.choice("+-")
        half = a + b if first == "+" else a - b
        whole = half + c if second == "+" else half - c
        asked = f"{a}{first}{b}{second}{c}"
        prompt = f"{asked}: "
        if instruct:
            prompt = f'Compute {asked}. Work it out, then end with "{MARK}" and the number.'
        steps = f"{a}{first}{b}={half} {half}{second}{c}={whole}"
        tasks.append(Task(prompt, f"{steps} {MARK} {whole}", {"result": whole}))
    return tasks


def _arithmetic_reward(task: Task, completion: str) -> float:
    return float(answer_of(completion) == str(task.goal["result"]))


# -- reasoning-gym -----------------------------------------------------------------------------
def _reasoning_gym(name: str) -> Environment:
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(
            f"{name[:40]!r} is a task of reasoning-gym, which is not installed: pip install "
            "reasoning-gym, or take one of " + ", ".join(OWN)
        ) from None
    known = list(reasoning_gym.factory.DATASETS)
    if name not in known:
        raise InputError(f"reasoning-gym has no task {name[:40]!r}.{nearest(name, known)}")
    held: dict[int, Any] = {}

    def sample(count: int, seed: int = 0, *, instruct: bool = True) -> list[Task]:
        held[seed] = data = reasoning_gym.create_dataset(name, size=count, seed=seed)
        asked = f'Work it out, then end with "{MARK}" and the answer.'
        return [
            Task(f"{e['question']}\n{asked}", f"{MARK} {e['answer']}", {"entry": e, "seed": seed})
            for e in (data[n] for n in range(count))
        ]

    def reward(task: Task, completion: str) -> float:
        data = held[task.goal["seed"]]
        return float(data.score_answer(answer=answer_of(completion), entry=task.goal["entry"]))

    return Environment(name, sample, reward)


OWN: dict[str, Environment] = {
    "countdown": Environment("countdown", countdown, _countdown_reward),
    "arithmetic": Environment("arithmetic", arithmetic, _arithmetic_reward),
}
"""The environments that come with the package, by name."""


def environment(name: str) -> Environment:
    """An environment by name: one of `OWN`, or any task of reasoning-gym.

    Raises:
        InputError: there is none, or reasoning-gym is not installed.
    """
    return OWN[name] if name in OWN else _reasoning_gym(name)
