"""What a constructor or a call cannot use it refuses by `InputError`, never by another error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

import regard
from regard import catalog
from regard.cards import allowed
from regard.core import Mask, attend
from regard.errors import RegardError
from regard.zoo import Loading
from regard.zoo.tiny import tiny

NO_NUMBERS = (math.nan, math.inf, -math.inf, "many", "", "9" * 5000, [], {}, object(), b"x")
ODD = (
    -1,
    0,
    1.5,
    10**400,
    True,
    None,
    (),
    (-1,),
    ("many",),
    "caf\udce9",
    "0-999999999",
)
SETTINGS = {m.card.slug: m.settings for m in catalog.everything() if m.settings is not None}


def made(kind: Callable[..., Any], given: dict[str, Any]) -> str:
    """What came of it: "taken", "refused", or the error that should not be."""
    try:
        kind(**given)
    except RegardError as problem:
        assert len(str(problem)) < 1000, str(problem)[:200]
        return "refused"
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[:150]
    return "taken"


def is_number(one: Any) -> bool:
    """Whether a setting is a number and nothing else."""
    default = one.default
    plain = isinstance(default, (int, float)) and not isinstance(default, bool)
    return plain and one.metadata["among"] is None and one.metadata["kind"] is None


@pytest.mark.parametrize("slug", [*sorted(SETTINGS), "loading"])
def test_settings(slug: str) -> None:
    kind: Any = Loading if slug == "loading" else SETTINGS[slug]
    example = {} if slug == "loading" else catalog.method(slug).card.example
    names = {f.name for f in fields(kind)}
    example = {n: v for n, v in example.items() if n in names}
    wrong = []
    for one in fields(kind):
        for value in (*NO_NUMBERS, *ODD) if one.metadata else ():
            said = made(kind, {**example, one.name: value})
            sure = is_number(one) and any(value is v for v in NO_NUMBERS)
            if said not in ("refused", "taken") or (sure and said == "taken"):
                wrong.append(f"{one.name}={value!r:.40}: {said}")
            if is_number(one):
                assert allowed(one)
    assert not wrong, "\n".join(wrong)


def qkv() -> dict[str, Any]:
    return dict(zip("qkv", torch.randn(3, 1, 2, 5, 8)))


ATTEND = {
    "three dimensions": {"q": torch.randn(2, 5, 8)},
    "no tensor": {"k": "keys"},
    "none": {"v": None},
    "another head size": {"k": torch.randn(1, 2, 5, 4)},
    "other heads": {"k": torch.randn(1, 3, 5, 8), "v": torch.randn(1, 3, 5, 8)},
    "whole numbers": {"q": torch.ones(1, 2, 5, 8, dtype=torch.long)},
    "scale nan": {"scale": math.nan},
    "scale word": {"scale": "many"},
    "softcap 0": {"softcap": 0.0},
    "softcap inf": {"softcap": math.inf},
    "softcap word": {"softcap": "many"},
    "mask word": {"mask": "causal"},
    "mask tensor": {"mask": torch.ones(5, 5, dtype=torch.bool)},
    "mask of another length": {"mask": Mask.padding(torch.ones(1, 7).long())},
    "mask of other rows": {"mask": Mask.padding(torch.ones(3, 5).long())},
    "bias of booleans": {"bias": torch.ones(1, 1, 5, 5, dtype=torch.bool)},
    "bias of another shape": {"bias": torch.ones(5, 5)},
    "bias word": {"bias": "many"},
    "sinks of another shape": {"sinks": torch.ones(3)},
    "sinks word": {"sinks": "many"},
    "no kernel": {"kernel": "many"},
    "kernel number": {"kernel": 3},
}


@pytest.mark.parametrize("what", ATTEND)
def test_attend(what: str) -> None:
    assert made(attend, {**qkv(), **ATTEND[what]}) == "refused"


MASKS: dict[str, Callable[[], Any]] = {
    "window 0": lambda: Mask.window(0),
    "window nan": lambda: Mask.window(math.nan),  # type: ignore[arg-type]
    "window word": lambda: Mask.window("many"),  # type: ignore[arg-type]
    "band word": lambda: Mask.band("many", 0),  # type: ignore[arg-type]
    "band nan": lambda: Mask.band(math.nan, 0),  # type: ignore[arg-type]
    "padding word": lambda: Mask.padding("many"),  # type: ignore[arg-type]
    "padding of one dimension": lambda: Mask.padding(torch.ones(4).long()),
    "dense of floats": lambda: Mask.dense(torch.ones(4, 4)),
    "dense word": lambda: Mask.dense("many"),  # type: ignore[arg-type]
    "and a word": lambda: Mask.causal() & "many",  # type: ignore[operator]
    "or none": lambda: Mask.causal() | None,  # type: ignore[operator]
    "prefix word": lambda: Mask.prefix("many"),  # type: ignore[arg-type]
    "prefix half": lambda: Mask.prefix(0.5),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", MASKS)
def test_masks(what: str) -> None:
    assert made(MASKS[what], {}) == "refused"


WATCH: dict[str, dict[str, Any]] = {
    "no fact": {"facts": ["many"]},
    "facts number": {"facts": 3},
    "fact number": {"facts": [3]},
    "layers beyond": {"layers": [99]},
    "layers below": {"layers": [-99]},
    "layers word": {"layers": "many"},
    "layers nan": {"layers": [math.nan]},
    "heads beyond": {"heads": [99]},
    "heads word": {"heads": ["many"]},
    "no part": {"part": "many"},
    "model word": {"model": "many"},
    "model none": {"model": None},
}


@pytest.mark.parametrize("what", WATCH)
def test_watch(what: str) -> None:
    given = {"model": tiny("llama"), **WATCH[what]}
    assert made(regard.watch, given) == "refused"


APPLY: dict[str, list[Any]] = {
    "word": ["many"],
    "none": [None],
    "class": [regard.H2O],
    "number": [3],
}


@pytest.mark.parametrize("what", APPLY)
def test_apply(what: str) -> None:
    model = tiny("llama")
    assert made(lambda: regard.apply(model, *APPLY[what]).__enter__(), {}) == "refused"
    assert made(lambda: regard.apply("many", regard.H2O(ratio=0.5)).__enter__(), {}) == "refused"
