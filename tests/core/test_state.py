"""The algebra of States, property by property."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core import Mask, State, attend, mass, merge, rest, reweight

from .cases import close, tensors

sizes = st.integers(1, 12)
cuts = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@given(queries=sizes, keys=sizes, cuts=cuts, seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_merge_of_any_partition_is_the_whole(
    queries: int, keys: int, cuts: list[int], seed: int
) -> None:
    q, k, v = tensors((1, 2, 1, queries, keys, 4), torch.float64, seed)
    edges = sorted({0, keys, *(c for c in cuts if c < keys)})
    parts = [attend(q, k[:, :, a:b], v[:, :, a:b]) for a, b in pairwise(edges)]
    whole = attend(q, k, v)
    for order in (parts, parts[::-1]):
        merged = merge(*order)
        close(merged.out, whole.out, 1e-12)
        close(merged.lse, whole.lse, 1e-12)
    close(sum(mass(p, whole) for p in parts), torch.ones_like(whole.lse), 1e-12)


@given(cut=st.integers(0, 9), seed=st.integers(0, 999), steep=st.floats(0.1, 30))
@settings(max_examples=60, deadline=None)
def test_rest_is_the_complement(cut: int, seed: int, steep: float) -> None:
    q, k, v = tensors((1, 2, 2, 9, 9, 4), torch.float64, seed)
    part = Mask.causal() & Mask.prefix(cut)
    other = Mask.causal() & ~Mask.prefix(cut)
    whole = attend(q, k, v, mask=Mask.causal(), scale=steep)
    left = rest(
        whole,
        attend(q, k, v, mask=part, scale=steep),
        recompute=lambda: attend(q, k, v, mask=other, scale=steep),
    )
    true = attend(q, k, v, mask=other, scale=steep)
    close(left.out, true.out, 1e-9)
    seen = true.lse > -torch.inf
    close(left.lse[seen], true.lse[seen], 1e-9)
    # a complement without keys is a rounding error away from nothing, never NaN
    assert not torch.isnan(left.out).any()


def test_rest_recomputes_where_subtraction_loses_digits() -> None:
    q, k, v = tensors((1, 1, 1, 6, 6, 4))
    k[:, :, 0] = q[:, :, -1] * 40  # the first key takes nearly all of the last query
    whole = attend(q, k, v)
    part = attend(q, k[:, :, :1], v[:, :, :1])
    assert float(mass(part, whole)[0, 0, -1]) > 0.999
    true = attend(q, k[:, :, 1:], v[:, :, 1:])
    exact = rest(whole, part, recompute=lambda: true)
    close(exact.out[:, :, -1], true.out[:, :, -1], 1e-6)
    careless = rest(whole, part)
    assert float((careless.out - true.out)[:, :, -1].abs().max()) > 1e-3


def test_masses_given_back_are_neutral() -> None:
    q, k, v = tensors((2, 2, 2, 7, 7, 4), torch.float64)
    parts = [attend(q, k[:, :, :3], v[:, :, :3]), attend(q, k[:, :, 3:], v[:, :, 3:])]
    whole = attend(q, k, v)
    same = reweight(parts, [mass(p, whole) for p in parts])
    close(same.out, whole.out, 1e-12)
    close(same.lse, whole.lse, 1e-12)


def test_reweight_halves_a_key_set() -> None:
    q, k, v = tensors((1, 2, 2, 7, 7, 4), torch.float64)
    first, others = attend(q, k[:, :, :1], v[:, :, :1]), attend(q, k[:, :, 1:], v[:, :, 1:])
    share = mass(first, merge(first, others))
    changed = reweight([first, others], [share / 2, 1 - share / 2])
    p = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1)
    scaled = torch.cat(
        [p[..., :1] / 2, p[..., 1:] / (1 - share)[..., None] * (1 - share / 2)[..., None]], -1
    )
    close(changed.out, scaled @ v, 1e-12)


def test_empty_states() -> None:
    nothing = State(torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -torch.inf))
    both = merge(nothing, nothing)
    assert torch.equal(both.out, nothing.out) and torch.equal(both.lse, nothing.lse)
    assert torch.equal(mass(nothing, nothing), torch.zeros(1, 1, 2))


def test_merge_carries_gradients_past_empty_rows() -> None:
    q, k, v = tensors((1, 1, 1, 4, 4, 4), torch.float64, grad=True)
    early = attend(q, k, v, mask=Mask.causal() & Mask.prefix(2))
    late = attend(q, k, v, mask=Mask.causal() & ~Mask.prefix(2))  # empty for the first two queries
    grads = torch.autograd.grad(merge(early, late).out.sum(), (q, k, v))
    whole = torch.autograd.grad(attend(q, k, v, mask=Mask.causal()).out.sum(), (q, k, v))
    for found, true in zip(grads, whole):
        close(found, true, 1e-12)


def test_wrong_counts() -> None:
    import pytest

    with pytest.raises(ValueError, match="at least one"):
        merge()
    with pytest.raises(ValueError, match="one mass a set"):
        reweight([State(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))], [])
