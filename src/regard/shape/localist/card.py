"""The card of Localist LLMs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.cards import Card, Checked, Paper, setting

CARD = Card(
    slug="localist",
    name="Localist LLMs",
    verb="shape",
    does="a dial from opaque to rule-readable attention",
    paper=Paper("Localist LLMs with Recruitment Learning", "Diederich", 2025, "2510.17358"),
    families=(
        "causal LM",
        "text encoder",
        "ViT",
    ),
    method="LocalityDial",
    exports=("rules.Rule", "calibrate.calibrate_dial"),
    takes="text",
    neutral={"locality": 0.0},
    example={
        "blocks": {"a": [[1, 12]], "b": [[12, 30]]},
        "toward": "a",
        "locality": 1.0,
    },
    examples=(
        'regard run localist --docs a.txt b.txt --toward a --locality 0.6 --question "Who is the '
        'owner?"',
    ),
)

Spans = Mapping[str, Sequence[Any]] | Callable[..., Any]


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    blocks: Spans | None = setting(
        None,
        "token ranges by name, {'a': [[3, 40]]}, or a function of input_ids that numbers tokens",
        option="",
        function=True,
    )
    toward: str | Sequence[str] | None = setting(
        None, "blocks that tokens outside of every block look at", option=""
    )
    rules: str | Path | Sequence[Any] | None = setting(
        None, "YAML file of rules: who looks at which blocks", kind=Path
    )
    locality: float = setting(0.0, "the dial: 0 is the plain model", least=0, to=1)
    beta: float = setting(8.0, "strength of the dial in nats", above=0, to=1000)
    depth: float = setting(
        0.0, "exponent of the depth schedule, locality * (layer / last) ** depth", least=0, to=64
    )
    hard: bool = setting(False, "where the dial stands at 1, hide the other blocks")
    strict: bool = setting(False, "hide what lies outside of every block too")
    own: bool = setting(True, "tokens of a block look at their own block")
    tau: float = setting(1.0, "temperature of the softmax while the dial acts", above=0, to=16)
    bias: str = setting(
        "blocks",
        "distance lowers scores by distance instead, for comparison",
        among=("blocks", "distance"),
    )
    sigma: float = setting(4.0, "tokens a nat, in the distance bias", above=0)
    check: bool = setting(True, "measure leakage, entropy and bounds on every call")


@dataclass(eq=False)
class RunSettings(Settings):
    """The same for `regard run localist`, which shows the dial at 0 beside this."""

    locality: float = setting(0.6, "the dial; the answer at 0 is shown beside it", above=0, to=1)
