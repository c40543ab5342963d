"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Paired(NamedTuple):
    """Differences of pairs: their mean, its 95 % interval, and the differences themselves."""

    mean: float
    low: float
    high: float
    values: list[float]

    def limits(self, name: str = "{}") -> dict[str, float]:
        """The interval as numbers by name, `{}` in which stands for "low" and "high"."""
        return {name.format("low"): self.low, name.format("high"): self.high}


def mean(values: Sequence[float]) -> float:
    """
    >>> mean([1, 2])
    1.5
    """
    return sum(values) / len(values)


def bootstrap(values: Sequence[float], *, draws: int = 4000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean, by drawing the values again with repetition.

    >>> bootstrap([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    import numpy

    sample = numpy.asarray(values, dtype=float)
    if len(sample) == 0:
        raise ValueError("an interval needs at least one value")
    drawn = numpy.random.default_rng(seed).integers(len(sample), size=(draws, len(sample)))
    low, high = numpy.quantile(sample[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def paired(a: Sequence[float], b: Sequence[float], *, draws: int = 4000, seed: int = 0) -> Paired:
    """How much greater `a` is than `b`, measured on the same texts, images or seeds in turn.

    >>> paired([2.0, 3.0], [1.0, 2.0])
    Paired(mean=1.0, low=1.0, high=1.0, values=[1.0, 1.0])

    Raises:
        ValueError: not equally many values, or none.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values cannot be paired with {len(b)}")
    differences = [x - y for x, y in zip(a, b)]
    low, high = bootstrap(differences, draws=draws, seed=seed)
    return Paired(mean(differences), low, high, differences)
