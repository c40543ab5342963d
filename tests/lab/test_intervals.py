"""Paired differences with their intervals."""

from __future__ import annotations

import random

import pytest

from regard.lab.intervals import bootstrap, paired


def test_a_pair_is_the_bootstrap_of_its_differences() -> None:
    draw = random.Random(0)
    a, b = ([draw.gauss(mu, 1) for _ in range(50)] for mu in (0.5, 0))
    apart = paired(a, b)
    each = [x - y for x, y in zip(a, b)]
    assert apart.values == each and apart.mean == sum(each) / 50
    assert (apart.low, apart.high) == bootstrap(each)
    assert apart.low < apart.mean < apart.high
    assert paired(b, a).mean == -apart.mean
    assert paired(a, b, seed=1)[1:3] == bootstrap(each, seed=1) != bootstrap(each)


def test_what_is_not_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="2 values cannot be paired with 3"):
        paired([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="at least one"):
        paired([], [])
