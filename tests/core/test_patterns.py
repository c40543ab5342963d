"""The named masks: each says what its definition says, pair by pair, at any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core import Mask, attend, patterns
from regard.core.mask import EMPTY
from regard.core.patterns import PATTERNS, Blocks, build, documents

Rule = Callable[[int, int], bool]


def _rule(name: str, total: int, p: dict[str, Any]) -> Rule:
    """The definition in plain words, one pair at a time."""
    starts: list[int] = []
    owner: list[int] = []
    for n, length in enumerate(p.get("lengths", [total])):
        starts.append(len(owner))
        owner += [n] * length
    w, prefix, block = p.get("window", 0), p.get("prefix", 0), p.get("block", 1)
    last = len(starts) - 1

    def same(q: int, k: int) -> bool:
        return owner[q] == owner[k]

    rules: dict[str, Rule] = {
        "full": lambda q, k: True,
        "causal": lambda q, k: k <= q,
        "full_document": same,
        "causal_document": lambda q, k: same(q, k) and k <= q,
        "sliding_window": lambda q, k: abs(q - k) <= w,
        "sliding_window_causal": lambda q, k: 0 <= q - k <= w,
        "share_question": lambda q, k: (same(q, k) and k <= q) or (owner[k] == 0 and owner[q] > 0),
        "causal_blockwise": lambda q, k: (same(q, k) and k <= q) or (owner[q] == last and k <= q),
        "prefix_lm_causal": lambda q, k: k < prefix or k <= q,
        "prefix_lm_document": lambda q, k: same(q, k) and (k - starts[owner[k]] < prefix or k <= q),
        "global_sliding_window": lambda q, k: abs(q - k) <= w or q < w or k < w,
        "block_causal_document": lambda q, k: same(q, k) and k < (q // block + 1) * block,
    }
    return rules[name]


def _pieces(total: int, draw: Any) -> list[int]:
    cuts = sorted(draw(st.sets(st.integers(1, total), max_size=4)) | {total})
    return [b - a for a, b in zip([0, *cuts], cuts)]


STATIC = [n for n, p in PATTERNS.items() if p.kind != "dynamic"]


@pytest.mark.parametrize("name", STATIC)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_static_masks_are_their_definition(name: str, data: Any) -> None:
    total = data.draw(st.integers(1, 40))
    wanted = PATTERNS[name].parameters
    p: dict[str, Any] = {}
    if "window" in wanted:
        p["window"] = data.draw(st.integers(1, total + 3))
    if "prefix" in wanted:
        p["prefix"] = data.draw(st.integers(1, total + 3))
    if name == "block_causal_document":
        p["block"] = data.draw(st.integers(1, 9))
        blocks = _pieces(-(-total // p["block"]), data.draw)
        p["lengths"] = [b * p["block"] for b in blocks]
        p["lengths"][-1] -= sum(p["lengths"]) - total
    elif "lengths" in wanted:
        p["lengths"] = _pieces(total, data.draw)
    rule = _rule(name, total, p)
    true = torch.tensor([[rule(q, k) for k in range(total)] for q in range(total)])
    mask = build(name, total, **p)
    assert torch.equal(mask.cells(total, total)[0, 0], true), (total, p)
    assert mask.area(total, total) == int(true.sum())
    for block in (3, 8):
        _grid_holds(mask.grid(total, total, block, block), true, block)
    assert _area_of_ranges(mask.ranges(total, total)) == int(true.sum())


@pytest.mark.parametrize("name", list(PATTERNS))
@given(total=st.integers(1, 700), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_area_is_the_count_of_the_dense_form(name: str, total: int, seed: int) -> None:
    wanted = PATTERNS[name].parameters
    given_ = {"seed": seed} if "seed" in wanted else {}
    if name in ("sliding_window", "sliding_window_causal"):
        given_["window"] = seed
    if "block" in wanted:
        given_["block"] = 2 + seed
    mask = build(name, total, **given_)
    cells = mask.cells(total, total)[0, 0]
    assert mask.area(total, total) == int(cells.sum())
    _grid_holds(mask.grid(total, total, 64, 64), cells, 64)


def _grid_holds(grid: torch.Tensor, true: torch.Tensor, block: int) -> None:
    for a, row in enumerate(grid.tolist()):
        for b, state in enumerate(row):
            part = true[a * block : (a + 1) * block, b * block : (b + 1) * block]
            assert not (state == 0 and part.any())
            assert not (state == 2 and not part.all())


def _area_of_ranges(ranges: list[Any]) -> int:
    area = 0
    for r in ranges:
        for row in range(r.q1 - r.q0):
            start = r.k0 + (row if r.kind in ("inverse", "band") else 0)
            stop = r.k1 - (r.q1 - r.q0 - 1 - row if r.kind in ("causal", "band") else 0)
            area += max(0, stop - start)
    return area


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 0.8, 1.0])
def test_block_sparse_keeps_its_share(block: int, density: float) -> None:
    total = 2048
    mask = build("block_sparse", total, block=block, density=density)
    kept = round(density * (total // block)) * block
    cells = mask.cells(total, total)[0, 0]
    assert (cells.sum(1) == kept).all()
    tiles = cells.view(total // block, block, total // block, block).sum((1, 3))
    assert set(tiles.unique().tolist()) <= {0, block * block}
    grid = mask.grid(total, total, block, block)
    assert torch.equal(grid == 2, tiles > 0) and torch.equal(grid == 0, tiles == 0)
    assert mask.area(total, total) == kept * total


def test_dynamic_masks_follow_their_seed() -> None:
    one, again, other = (build("block_sparse", 512, seed=s).cells(512, 512) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_variable_blocks_have_the_sizes_they_say() -> None:
    mask = build("variable_block_sparse", 3000, block=100, density=0.5)
    assert isinstance(mask, Blocks)
    sizes = mask.edges_q.diff()
    assert sizes[:-1].min() >= 50 and sizes.max() <= 150 and len(sizes.unique()) > 3
    assert 0.3 < mask.area(3000, 3000) / 3000**2 < 0.7


@given(total=st.integers(1, 40000), seed=st.integers(0, 9), corpus=st.sampled_from([None, "pile"]))
@settings(max_examples=40, deadline=None)
def test_documents_add_up(total: int, seed: int, corpus: str | None) -> None:
    lengths = documents(total, corpus, seed)
    assert sum(lengths) == total and min(lengths) >= 1
    assert lengths == documents(total, corpus, seed)


def test_window_sizes_have_no_off_by_one() -> None:
    assert build("sliding_window_causal", 50, window=4).cells(50, 50)[0, 0, 30].sum() == 5
    assert build("sliding_window", 50, window=4).cells(50, 50)[0, 0, 30].sum() == 9
    seen = build("global_sliding_window", 50, window=4).cells(50, 50)[0, 0]
    assert seen[:, :4].all() and seen[:4].all() and not seen[4, 9]


def test_long_masks_are_never_built() -> None:
    """A matrix of these would be a terabyte; their blocks and areas are a moment's work."""
    total = 2**20
    assert build("sliding_window_causal", total).grid(total, total, 2**14, 2**14).sum() > 0
    blocks = build("block_sparse", total, block=2**13, density=0.5)
    assert blocks.area(total, total) == total * total // 2


@pytest.mark.parametrize("name", list(PATTERNS))
def test_attend_computes_every_pattern(name: str) -> None:
    total = 300
    small = {n: 40 for n in ("block", "window") if n in PATTERNS[name].parameters}
    mask = build(name, total, **small)
    q, k, v = (torch.randn(1, h, total, 16, dtype=torch.float64) for h in (4, 2, 2))
    found, true = attend(q, k, v, mask=mask), attend(q, k, v, mask=mask, kernel="reference")
    assert torch.allclose(found.out, true.out, atol=1e-10)
    assert torch.allclose(found.lse, true.lse, atol=1e-10)


def test_blocks_between_documents_are_known_to_be_empty() -> None:
    total, lengths = 1024, [90, 300, 34, 600]
    apart = Mask.documents(lengths).grid(total, total, 32, 32) == EMPTY
    mask = build("prefix_lm_document", total, lengths=lengths, prefix=20)
    assert int(apart.sum()) > 400
    assert bool((mask.grid(total, total, 32, 32) == EMPTY)[apart].all())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="choose one of full, causal"):
        build("sliding", 10)
    with pytest.raises(ValueError, match="takes window, not prefix"):
        build("sliding_window", 10, prefix=3)
    with pytest.raises(ValueError, match="add up to 10"):
        build("causal_document", 10, lengths=[3, 3])
    with pytest.raises(ValueError, match="whole blocks of 4"):
        build("block_causal_document", 10, block=4, lengths=[5, 5])
    with pytest.raises(ValueError, match="share of blocks kept"):
        build("block_sparse", 10, density=0.0)
    with pytest.raises(ValueError, match="unknown corpus"):
        documents(10, "wiki")
    with pytest.raises(ValueError, match="at least 1"):
        build("causal", 0)


def test_every_pattern_is_described() -> None:
    assert len(PATTERNS) == 14
    assert all(p.definition.endswith(".") for p in PATTERNS.values())
    assert patterns.PATTERNS["sliding_window"].parameters == {"window": 1024}
