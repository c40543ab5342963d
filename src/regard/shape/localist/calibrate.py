"""How strong the dial must be for a target leakage (C4), and readings of the dial on one prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.reach import Session

from .facts import Rows, needed
from .method import LocalityDial

ROUNDS = 4  # the dial changes what later layers see, so margins are read again under it


@dataclass(frozen=True)
class Calibration:
    """A strength and what it reaches.

    Attributes:
        beta: the strength in nats.
        target: the leakage asked for; rule: "bound" (C4) or "mean".
        leakage: mean leakage measured at that strength; plain: at locality 0.
        guaranteed: share of rows for which C4 guarantees the target at that strength.
        rows: rows read.
    """

    beta: float
    target: float
    rule: str
    leakage: float
    plain: float
    guaranteed: float
    rows: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_dial(model: Any, dial: LocalityDial, **inputs: Any) -> dict[str, Any]:
    """One forward pass under the dial: its report, at locality 0 too, which changes nothing."""
    dial._watch = True
    try:
        with torch.no_grad(), Session(model, [dial]):
            model(**inputs)
        return dial.report()
    finally:
        dial._watch = False


def calibrate_dial(
    model: Any,
    dial: LocalityDial,
    inputs: Sequence[dict[str, Any]],
    *,
    target: float = 0.05,
    rule: str = "mean",
    share: float = 1.0,
) -> Calibration:
    """The least strength with which tokens outside of every block leak at most `target`.

    Rule "bound" is C4: for `share` of the rows the margin alone guarantees it, whatever the scores
    within. Rule "mean" asks that the measured mean is at most the target. Both are read again with
    the dial at work, because it changes what later layers see. Layers that the depth schedule
    leaves at 0 do not count.

    Args:
        dial: turned to the locality that the strength is for; its beta is set to the result.
        inputs: keyword arguments of the model, one mapping a forward pass; held-out texts.

    >>> import regard
    >>> model = regard.zoo.tiny("llama")
    >>> dial = LocalityDial(blocks={"a": [(1, 9)], "b": [(9, 20)]}, toward="a", locality=0.5)
    >>> ids = torch.arange(3, 33)[None]
    >>> found = calibrate_dial(model, dial, [{"input_ids": ids}], target=0.02)
    >>> found.leakage <= 0.02 < found.plain
    True

    Raises:
        InputError: a target outside of (0, 1), a dial at 0, no text, or no row that could leak.
    """
    if not 0 < target < 1:
        raise InputError(f"a target leakage lies between 0 and 1, not {target}")
    if not 0 < share <= 1:
        raise InputError(f"share is above 0 and at most 1, not {share}")
    if rule not in ("bound", "mean"):
        raise InputError(f"rule is bound or mean, not {rule!r}")
    if not dial.locality:
        raise InputError("the dial stands at 0, where no strength does anything: turn it first")
    if not inputs:
        raise InputError("calibration reads held-out texts: give at least one")
    locality = dial.locality
    dial.locality = 0.0
    try:
        plain = _leakage(_read(model, dial, inputs), 0.0)
    finally:
        dial.locality = locality
    dial.beta, beta = 1e-6, 0.0
    for _ in range(ROUNDS):
        rows = _read(model, dial, inputs)
        beta = max(beta, _bound(rows, target, share) if rule == "bound" else _mean(rows, target))
        dial.beta = max(beta, 1e-6)
        rows = _read(model, dial, inputs)
        leakage = _leakage(rows, dial.beta)
        if leakage <= target:
            break
    sure = _strengths(rows, target) <= dial.beta * (1 + 1e-6)
    count = sum(len(odds) for odds, *_ in rows)
    return Calibration(dial.beta, target, rule, leakage, plain, float(sure.double().mean()), count)


Read = list[tuple[Tensor, float, Rows, Tensor]]
"""By call: log odds of the leakage of the rows, shift by nat of strength, all rows, which count."""


def _read(model: Any, dial: LocalityDial, inputs: Sequence[dict[str, Any]]) -> Read:
    """Rows of tokens outside of every block, in layers where the dial acts."""
    found: Read = []
    for given in inputs:
        dial._rows = {}
        try:
            read_dial(model, dial, **given)
            for layer, held in dial._rows.items():
                share = (layer / dial._last) ** dial.depth if dial._last and dial.depth else 1.0
                for rows, _, chosen in held:
                    found += _picked(rows, chosen, dial.locality * share / dial.tau)
        finally:
            dial._rows = None
    if not found:
        raise InputError(
            "no token outside of every block sees both relevant and other keys: put a question "
            "after the blocks, and name what it is to look at"
        )
    return found


def _picked(rows: Rows, chosen: Tensor, by_nat: float) -> Read:
    at = rows.split & chosen[:, None]
    if not bool(at.any()):
        return []
    return [(rows.odds[at].double(), by_nat, rows, at)]


def _strengths(rows: Read, target: float) -> Tensor:
    """Of each row the strength that C4 asks for."""
    return torch.cat([needed(r, target)[at] / by_nat for _, by_nat, r, at in rows if by_nat > 0])


def _bound(rows: Read, target: float, share: float) -> float:
    ordered = _strengths(rows, target).sort().values
    return float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def _leakage(rows: Read, beta: float) -> float:
    return float(torch.cat([(odds - by_nat * beta).sigmoid() for odds, by_nat, *_ in rows]).mean())


def _mean(rows: Read, target: float) -> float:
    """The strength at which the mean leakage is the target, by halving."""
    low, high = 0.0, 1.0
    if _leakage(rows, 0.0) <= target:
        return 0.0
    while _leakage(rows, high) > target:
        high *= 2
        if high > 1000:
            raise InputError("no strength up to 1000 nats reaches the target: turn the dial higher")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _leakage(rows, middle) > target else (low, middle)
    return high
