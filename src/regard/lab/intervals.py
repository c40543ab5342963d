"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence


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
