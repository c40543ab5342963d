"""Every fact equals the same fact read off the dense float64 map."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.core import (
    Collision,
    Columns,
    Distance,
    Entropy,
    Fact,
    Influence,
    LogSumExp,
    Mask,
    Mass,
    MaxLogit,
    MeanReceived,
    Received,
    Rows,
    Thumbnail,
    TopKeys,
    WindowedDistance,
    attend,
    attend_and_measure,
    collision,
    distance,
    entropy,
    identities,
    measure,
    received,
    segment_mass,
)
from regard.core.facts import View
from regard.core.kernels import reference, tiled

from .cases import SHAPES, by_head, close, masks, tensors

CALLS = [(s, m) for s in SHAPES for m in masks(1, 8, 8)]


def dense(p: Tensor, cells: Tensor, lse: Tensor | None = None) -> dict[str, Tensor]:
    """The facts by their definitions, from P `[batch, heads, queries, keys]`; scores are log P and
    the lse.
    """
    queries, keys = p.shape[2:]
    i = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)
    d = (i - j).abs()
    cells = cells.expand(p.shape[0], -1, queries, keys)
    band = (i - j >= 2) & (i - j <= 9)
    late = (i >= keys // 2) & (i < keys)
    scores = p.new_zeros(1) if lse is None else p.log() + lse.double()[..., None]
    width = Thumbnail(16).width(keys)
    left = torch.nn.functional.one_hot(i[:, 0] // width, -(-keys // width)).double()
    right = torch.nn.functional.one_hot(j // width, -(-keys // width)).double()
    bins = left.T @ p @ right
    return {
        "received": p.sum(2),
        "received late": (p * late).sum(2),
        "mean_received": p.sum(2) / cells.sum(2).clamp_min(1),
        "influence": (p * band).sum(2) / (cells & band).sum(2).clamp_min(1),
        "entropy": -torch.special.xlogy(p, p).sum(-1),
        "distance": (p * d).sum(-1),
        "waad": (p * d.clamp_max(4)).sum(-1),
        "mass": torch.stack([p[..., : keys // 2].sum(-1), p[..., keys // 3 :].sum(-1)], -1),
        "collision": (p * p).sum(-1),
        "max_logit": scores.amax(-1),
        "lse": scores if lse is None else lse.double(),
        "rows": p[:, :, [-1]],
        "columns": p[..., [0, keys - 1]],
        "thumbnail": bins / (left.T @ cells.any(-1, keepdim=True).double()).clamp_min(1),
        "top": p[:, :, -1:].topk(3, -1).values,
    }


def facts(keys: int) -> dict[str, Fact]:
    return {
        "received": Received(),
        "received late": Received(queries=(keys // 2, keys)),
        "mean_received": MeanReceived(),
        "influence": Influence(band=(2, 9)),
        "entropy": Entropy(),
        "distance": Distance(),
        "waad": WindowedDistance(4),
        "mass": Mass({"a": (0, keys // 2), "b": (keys // 3, keys)}),
        "collision": Collision(),
        "max_logit": MaxLogit(),
        "lse": LogSumExp(),
        "rows": Rows((keys - 1,)),
        "columns": Columns((0, keys - 1)),
        "thumbnail": Thumbnail(16),
        "top": TopKeys(3),
    }


def check(
    shape: tuple[int, ...],
    mask: Mask | None,
    tolerance: float = 1e-5,
    sinks: Tensor | None = None,
    **extra: object,
) -> None:
    q, k, v = tensors(shape)
    keys, queries = shape[4], shape[3]
    cells = (mask or Mask.full()).cells(queries, keys)
    p = reference.probabilities(q, k, mask, **extra)  # type: ignore[arg-type]
    lse = attend(q, k, v, mask=mask, sinks=sinks, **extra).lse  # type: ignore[arg-type]
    if sinks is not None:  # they leave less for the keys
        own = attend(q, k, v, mask=mask, **extra).lse  # type: ignore[arg-type]
        p = p * (own - lse).double().exp()[..., None]
    true = dense(p, cells, lse)
    chosen = facts(keys)
    call = {"mask": mask, "sinks": sinks, "offsets": (keys - queries, 0), **extra}
    listed = list(chosen.values())
    apart = measure(q, k, lse, listed, **call)  # type: ignore[arg-type]
    state, together = attend_and_measure(q, k, v, listed, **call)  # type: ignore[arg-type]
    for way, sums in (("after", apart), ("in one sweep", together)):
        for (name, fact), total in zip(chosen.items(), sums):
            value = fact.finish(total)
            value = value[0] if name == "top" else value
            assert value.dtype == torch.float32
            close(value, true[name], tolerance, f"{name} {way}")
    exact = attend(
        q,
        k,
        v,
        mask=mask,
        sinks=sinks,
        kernel="reference",
        **extra,  # type: ignore[arg-type]
    )
    close(state.out, exact.out, 3e-6, "out in one sweep")
    close(state.lse, exact.lse, 3e-6, "lse in one sweep")


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_largest_logit_is_that_of_the_dense_scores(size: float) -> None:
    q, k, v = tensors((2, 4, 2, 300, 300, 16))
    q = q * size
    mask = Mask.causal() & Mask.padding(torch.arange(300) >= torch.tensor([[0], [7]]))
    state = attend(q, k, v, mask=mask)
    sums = measure(q, k, state.lse, [MaxLogit(), LogSumExp()], mask=mask)
    true = reference.scores(q, k, mask, 0.25).amax(-1)
    close(MaxLogit().finish(sums[0]), true, 1e-5)
    assert torch.equal(LogSumExp().finish(sums[1]), state.lse)
    assert (MaxLogit().finish(sums[0])[1, :, :7] == -torch.inf).all()


@pytest.mark.parametrize("shape, mask", CALLS)
def test_every_fact_equals_the_dense_map(shape: str, mask: str) -> None:
    batch, _, _, queries, keys, _ = SHAPES[shape]
    check(SHAPES[shape], masks(batch, queries, keys)[mask])


@pytest.mark.parametrize("mask", ["causal", "window", "left padding"])
def test_with_soft_cap_and_bias(mask: str) -> None:
    shape = SHAPES["B2-T37-S53-H4-Hkv2-D16"]
    m = masks(2, 37, 53)[mask]
    check(shape, m, softcap=2.0)
    check(shape, m, bias=torch.randn(1, 4, 37, 53, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("size", [tiled.Size(16, 32, 8, 700), tiled.LARGE], ids=["small", "large"])
def test_sizes_of_tiles_change_nothing(size: tiled.Size, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.SIZES, "cpu", size)
    for mask in masks(2, 37, 53).values():
        check(SHAPES["B2-T37-S53-H4-Hkv2-D16"], mask)


@pytest.mark.parametrize("mask", ["causal", "window", "documents", "left padding"])
def test_with_learned_sinks(mask: str) -> None:
    shape, sinks = SHAPES["B2-T300-H6-Hkv2-D16"], torch.tensor([-2.0, 0.0, 1.0, 3.0, 6.0, 9.0])
    m = masks(2, 300, 300)[mask]
    if mask != "left padding":  # a query without keys looks at its sink alone
        check(shape, m, sinks=sinks)
    q, k, v = tensors(shape)
    lse = attend(q, k, v, mask=m, sinks=sinks).lse
    ids = torch.arange(300) // 100
    plain = entropy(q, k, lse, mask=m), distance(q, k, lse, mask=m)
    q.requires_grad_()
    asked = entropy(q, k, lse, mask=m), distance(q, k, lse, mask=m)
    for a, b in zip(asked, plain):
        close(a.detach(), b, 1e-4)
    spans = {str(n): (100 * n, 100 * n + 100) for n in range(3)}
    share = Mass(spans).finish(measure(q.detach(), k, lse, [Mass(spans)], mask=m)[0])
    close(segment_mass(q, k, lse, ids, mask=m).detach(), share, 1e-5)


@pytest.mark.parametrize("name", by_head(1, 1, 2, 2))
def test_with_masks_by_head(name: str) -> None:
    shape = SHAPES["B2-T37-S53-H4-Hkv2-D16"]
    check(shape, by_head(2, 4, 37, 53)[name])


def test_autocast_leaves_facts_exact() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for shape in ("B2-T37-S53-H4-Hkv2-D16", "B2-T300-H6-Hkv2-D16"):
            batch, _, _, queries, keys, _ = SHAPES[shape]
            check(SHAPES[shape], masks(batch, queries, keys)["causal window"])


def test_half_precision_gives_float32_facts() -> None:
    q, k, v = tensors((1, 4, 2, 40, 40, 16), torch.bfloat16)
    p = reference.probabilities(q, k, Mask.causal())
    lse = attend(q, k, v, mask=Mask.causal(), kernel="tiled").lse
    for name in ("received", "entropy", "distance"):
        fact = facts(40)[name]
        found = fact.finish(measure(q, k, lse, [fact], mask=Mask.causal())[0])
        assert found.dtype == torch.float32
        close(found, dense(p, Mask.causal().cells(40, 40))[name], 1e-5, name)


IDENTITIES: dict[str, Callable[..., Tensor]] = {
    "received": identities.received,
    "entropy": identities.entropy,
    "distance": identities.distance,
    "collision": identities.collision,
}


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("mask", list(masks(1, 8, 8)))
def test_identities_and_their_gradients(name: str, mask: str) -> None:
    shape = (2, 4, 2, 21, 30, 8)
    m = masks(2, 21, 30)[mask]
    results = []
    for way in ("identity", "dense"):
        q, k, v = tensors(shape, torch.float64, grad=True)
        if way == "identity":
            value = IDENTITIES[name](q, k, attend(q, k, v, mask=m).lse, mask=m)
        else:
            p = reference.probabilities(q, k, m)
            # xlogy has no gradient at 0, where the fact has none either
            safe = p.clamp_min(1e-300)
            value = dense(safe, (m or Mask.full()).cells(21, 30))[name]
        weight = torch.linspace(-1, 1, value.shape[-1], dtype=torch.float64)
        grads = torch.autograd.grad((value * weight).sum(), (q, k))
        results.append((value, *grads))
    for what, found, true in zip(("value", "gradient of q", "gradient of k"), *results):
        close(found, true, 1e-9, what)


def test_weighted_received_with_gradients_of_the_weights() -> None:
    q, k, v = tensors((1, 2, 2, 12, 12, 8), torch.float64)
    w = torch.randn(1, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    w.requires_grad_()
    lse = attend(q, k, v, mask=Mask.causal()).lse
    p = reference.probabilities(q, k, Mask.causal())
    found = received(q, k, lse, mask=Mask.causal(), weights=w)
    close(found, (p * w[..., None]).sum(2), 1e-10)
    ramp = torch.arange(12, dtype=torch.float64)
    close(torch.autograd.grad((found * ramp).sum(), w)[0], (p * ramp).sum(-1), 1e-10)


def test_public_functions_take_the_tiles_without_gradients() -> None:
    q, k, v = tensors((2, 4, 2, 30, 30, 8))
    m = Mask.causal()
    lse = attend(q, k, v, mask=m).lse
    p = reference.probabilities(q, k, m)
    true = dense(p, m.cells(30, 30))
    close(received(q, k, lse, mask=m), true["received"], 1e-5)
    close(entropy(q, k, lse, mask=m), true["entropy"], 1e-5)
    close(distance(q, k, lse, mask=m), true["distance"], 1e-5)
    close(collision(q, k, lse, mask=m), true["collision"], 1e-5)
    ids = torch.arange(30) // 10
    sums = torch.stack([p[..., ids == n].sum(-1) for n in range(3)], -1)
    close(segment_mass(q, k, lse, ids, mask=m), sums, 1e-5)


def test_the_fused_way_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU `measure` goes by the identities; the same code, forced here."""
    q, k, v = tensors((2, 4, 2, 30, 30, 8))
    lse = attend(q, k, v, mask=Mask.causal()).lse
    for fact in (Received(), Entropy(), Distance(), Collision()):
        fused = fact.fused(q, k, lse, Mask.causal(), 8**-0.5)
        assert fused is not None
        plain = fact.finish(measure(q, k, lse, [fact], mask=Mask.causal())[0])
        close(fused, plain, 1e-5, fact.name)
    assert Received(band=(1, 2)).fused(q, k, lse, None, 1.0) is None
    assert MeanReceived().fused(q, k, lse, None, 1.0) is None


@given(
    cuts=st.lists(st.integers(1, 39), max_size=4, unique=True),
    window=st.sampled_from([None, 6]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_streaming_gives_what_one_call_gives(
    cuts: list[int], window: int | None, seed: int
) -> None:
    """Any way to cut 40 tokens into calls with a cache, sliding or not, adds up to the whole."""
    q, k, v = tensors((2, 4, 2, 40, 40, 8), seed=seed)
    mask = Mask.causal() if window is None else Mask.causal() & Mask.window(window)
    chosen = list(facts(40).values())
    whole = measure(q, k, attend(q, k, v, mask=mask).lse, chosen, mask=mask)
    sums: list[dict[str, Tensor]] | None = None
    edges = [0, *sorted(cuts), 40]
    for a, b in pairwise(edges):
        first = 0 if window is None else max(0, a - window + 1)  # a sliding cache forgets
        qs, ks, vs = q[:, :, a:b], k[:, :, first:b], v[:, :, first:b]
        lse = attend(qs, ks, vs, mask=mask).lse
        part = measure(qs, ks, lse, chosen, mask=mask, offsets=(a, first))
        view = View(2, 2, 2, b - a, b - first, a, first, torch.float32, q.device)
        sums = (
            part
            if sums is None
            else [f.extend(old, new, view) for f, old, new in zip(chosen, sums, part)]
        )
    assert sums is not None
    for fact, found, true in zip(chosen, sums, whole):
        ends = [fact.finish(x) for x in (found, true)]
        if isinstance(fact, TopKeys):
            ends = [e[0] for e in ends]
        close(ends[0], ends[1], 1e-5, repr(fact))


def test_queries_that_do_not_count() -> None:
    q, k, v = tensors((2, 2, 2, 10, 10, 8))
    live = torch.ones(2, 10, dtype=torch.bool)
    live[1, 6:] = False
    lse = attend(q, k, v, mask=Mask.causal()).lse
    found = measure(
        q, k, lse, [Received(), MeanReceived(), Entropy()], mask=Mask.causal(), live=live
    )
    short = measure(
        q[1:, :, :6],
        k[1:, :, :6],
        lse[1:, :, :6],
        [Received(), MeanReceived(), Entropy()],
        mask=Mask.causal(),
    )
    for fact, a, b in zip((Received(), MeanReceived(), Entropy()), found, short):
        close(fact.finish(a)[1:, :, :6], fact.finish(b), 1e-6, fact.name)
    close(Entropy().finish(found[2])[1, :, 6:], torch.zeros(2, 4), 1e-6)


def test_closed_forms() -> None:
    """Equal scores: the uniform causal map, where every fact has a formula."""
    q, k, v = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    lse = attend(q, k, v, mask=Mask.causal()).lse
    sums = measure(q, k, lse, [MeanReceived(), Entropy(), Distance()], mask=Mask.causal())
    alpha = MeanReceived().finish(sums[0])[0, 0]
    harmonic = sum(1 / n for n in range(1, 65))
    assert abs(float(alpha[0]) - harmonic / 64) < 1e-6  # 0.0741: what no sink at all looks like
    seen = torch.arange(1, 65)
    close(Entropy().finish(sums[1])[0, 0], seen.log(), 1e-6)
    close(Distance().finish(sums[2])[0, 0], (seen - 1) / 2, 1e-6)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        WindowedDistance(0)
    with pytest.raises(ValueError, match="segments"):
        Mass()
    with pytest.raises(ValueError, match="lower to the higher"):
        Mass({"a": (5, 3)})
    with pytest.raises(ValueError, match="at least 1 cell"):
        Thumbnail(0)
    with pytest.raises(ValueError, match="at least 1 key"):
        TopKeys(0)
    with pytest.raises(ValueError, match="lower to the higher"):
        Influence(band=(10, 3))
    for wrong in ((-1,), 3):
        with pytest.raises(ValueError, match="absolute positions"):
            Rows(wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="absolute positions"):
            Columns(wrong)  # type: ignore[arg-type]


def test_more_queries_than_keys() -> None:
    q, k, v = tensors((1, 2, 2, 5, 1, 8))
    lse = attend(q, k, v).lse
    for asked in (False, True):
        far = distance(q.requires_grad_(asked), k, lse).detach()
        close(far, torch.tensor([4.0, 3, 2, 1, 0]).expand(1, 2, 5), 1e-6)
