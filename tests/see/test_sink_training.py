"""The rules of the claims about training, on numbers made up for both sides of each."""

from __future__ import annotations

from typing import Any

import pytest

from regard.see.sink_emergence import claims
from regard.see.sink_emergence.trained import COMMANDS, RULES, judged

YES = {
    "emergence": {"end": [0.3, 0.2], "early": [0.08, 0.07], "slow": [0.1, 0.1]},
    "position": {"second": [70.0, 60.0], "elsewhere": [5.0, 9.0], "without": [3.0, 20.0]},
    "bias": {"star": [0.6, 0.5], "first": [0.05, 0.04], "softmax": [0.3, 0.3]},
    "sigmoid": {"sigmoid": [0.05, 0.06], "softmax": [0.3, 0.2], "apart": 0.1},
}
CHANGES: list[tuple[str, dict[str, Any], tuple[bool, bool]]] = [
    ("emergence", {"slow": [0.4, 0.4]}, (False, True)),
    ("emergence", {"early": [0.12, 0.07]}, (False, True)),
    ("emergence", {"end": [0.07, 0.2]}, (False, False)),
    ("position", {"without": [21.0, 3.0]}, (False, True)),
    ("position", {"second": [19.0, 60.0]}, (False, True)),
    ("position", {"second": [4.0, 6.0]}, (False, False)),
    ("bias", {"first": [0.25, 0.04]}, (False, True)),
    ("bias", {"star": [0.01, 0.02]}, (False, False)),
    ("sigmoid", {"apart": 0.2}, (False, True)),
    ("sigmoid", {"sigmoid": [0.4, 0.1], "apart": 0.2}, (False, False)),
]


def test_every_claim_about_training_has_a_rule() -> None:
    assert set(RULES) == set(YES) <= {c.key for c in claims.CLAIMS}
    assert all(judged(key, values) == (True, True) for key, values in YES.items())


@pytest.mark.parametrize(("key", "change", "said"), CHANGES)
def test_rules(key: str, change: dict[str, Any], said: tuple[bool, bool]) -> None:
    assert judged(key, {**YES[key], **change}) == said


def test_the_queues_are_commands_that_exist() -> None:
    import shlex

    import typer

    from regard.cli.app import build

    app = typer.main.get_command(build(["train"]))
    train: Any = app.commands["train"].commands["lm"]  # type: ignore[attr-defined]
    known = {opt for param in train.params for opt in param.opts}
    for words in [*COMMANDS.values(), *(c.command for c in claims.CLAIMS if c.command)]:
        if words.startswith("regard train lm"):
            assert {w for w in shlex.split(words) if w.startswith("--")} <= known, words
