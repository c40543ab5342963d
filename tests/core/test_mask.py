"""One description, many forms: every form of a mask says the same."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core import Mask

from .cases import by_head, masks

NAMES = [n for n in masks(1, 8, 8) if n != "none"]


def _brute(name: str, b: int, i: int, j: int, keys: int, batch: int) -> bool:
    """The rules in plain words, one pair at a time."""
    causal, third = j <= i, max(1, keys // 3)
    left = j >= b * (keys // 3)
    right = (keys - 1 - j) >= b * (keys // 3)
    return {
        "full": True,
        "causal": causal,
        "window": abs(i - j) < 5,
        "causal window": causal and i - j < 5,
        "prefix": causal or j < keys // 4 + 1,
        "documents": causal and i // third == j // third,
        "left padding": causal and left,
        "right padding": causal and right,
        "not window": abs(i - j) >= 4,
        "rule": (i + j) % 3 != b % 3,
        "band apart": 2 <= i - j <= 9,
    }[name]


def _expected(name: str, batch: int, queries: int, keys: int) -> torch.Tensor:
    shift = keys - queries
    return torch.tensor(
        [
            [
                [_brute(name, b, i + shift, j, keys, batch) for j in range(keys)]
                for i in range(queries)
            ]
            for b in range(batch)
        ]
    )


def _covered(mask: Mask, queries: int, keys: int, row: int, head: int = 0) -> torch.Tensor:
    """How often the ranges cover each pair: once where they are disjoint and complete."""
    drawn = torch.zeros(queries, keys, dtype=torch.long)
    for r in mask.ranges(queries, keys, row, head):
        for q in range(r.q0, r.q1):
            start = r.k0 + (q - r.q0 if r.kind in ("inverse", "band") else 0)
            stop = r.k1 - (r.q1 - 1 - q if r.kind in ("causal", "band") else 0)
            drawn[q, start:stop] += 1
    return drawn


@pytest.mark.parametrize("name", NAMES)
@given(queries=st.integers(1, 20), more=st.integers(0, 9), batch=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_every_form_says_the_same(name: str, queries: int, more: int, batch: int) -> None:
    keys = queries + more
    mask = masks(batch, queries, keys)[name]
    assert mask is not None
    true = _expected(name, batch, queries, keys)
    cells = mask.cells(queries, keys)[:, 0]
    assert torch.equal(cells.expand(batch, -1, -1), true)
    area = mask.area(queries, keys)
    assert (area if isinstance(area, list) else [area] * batch) == true.sum((1, 2)).tolist()
    for block in (3, 8):
        grid = mask.grid(queries, keys, block, block)
        for a, c in torch.cartesian_prod(
            torch.arange(len(grid)), torch.arange(len(grid.T))
        ).tolist():
            part = true[:, a * block : (a + 1) * block, c * block : (c + 1) * block]
            if grid[a, c] == 0:
                assert not part.any()
            if grid[a, c] == 2:
                assert part.all()
    for b in range(batch):
        assert torch.equal(_covered(mask, queries, keys, b), true[b].long())
    arguments = mask.sdpa(queries, keys)
    if arguments.get("is_causal"):
        assert torch.equal(true[0], torch.ones_like(true[0]).tril())
    elif "attn_mask" in arguments:
        assert torch.equal(arguments["attn_mask"][:, 0].expand(batch, -1, -1), true)
    else:
        assert true.all()
    turned = mask.swap(queries, keys).cells(keys, queries)[:, 0].expand(batch, -1, -1)
    assert torch.equal(turned, true.transpose(1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_block_mask_of_flex_attention(name: str) -> None:
    queries, keys = 200, 300
    mask = masks(2, queries, keys)[name]
    assert mask is not None
    block = mask.block_mask(queries, keys)
    cells = mask.cells(queries, keys)[:, 0].any(0)
    padded = torch.nn.functional.pad(cells, (0, -keys % 128, 0, -queries % 128))
    some = padded.view(2, 128, 3, 128).any(3).any(1)
    assert torch.equal(block.to_dense()[0, 0].bool(), some)
    b, q, k = torch.meshgrid(
        torch.arange(2), torch.arange(0, 200, 17), torch.arange(0, 300, 13), indexing="ij"
    )
    true = mask.cells(queries, keys)[:, 0].expand(2, -1, -1)[b, q, k]
    for rule in (mask.mask_mod(queries, keys), block.mask_mod):
        assert torch.equal(rule(b, torch.zeros_like(b), q, k), true)


@pytest.mark.parametrize("name", by_head(1, 1, 2, 2))
def test_a_mask_by_head_in_every_form(name: str) -> None:
    """Indexed by head, not the first head's for all."""
    batch, heads, queries, keys = 2, 4, 37, 53
    mask = by_head(batch, heads, queries, keys)[name]
    cells = mask.cells(queries, keys).expand(batch, heads, -1, -1)
    assert mask.heads == heads
    assert not torch.equal(cells[:, 0], cells[:, 3])
    index = torch.meshgrid(*map(torch.arange, (batch, heads, queries, keys)), indexing="ij")
    block = mask.block_mask(queries, keys, block=16)
    for rule in (mask.mask_mod(queries, keys), block.mask_mod):
        assert torch.equal(rule(*index), cells)
    padded = torch.nn.functional.pad(cells, (0, -keys % 16, 0, -queries % 16))
    some = padded.view(batch, heads, 3, 16, 4, 16).any(5).any(3)
    assert torch.equal(block.to_dense().bool().expand(batch, heads, -1, -1), some)
    turned = mask.swap(queries, keys).cells(keys, queries)
    assert torch.equal(turned.expand(batch, heads, -1, -1), cells.transpose(2, 3))
    for h in (0, 3):
        count = cells[:, h].sum((1, 2)).tolist()
        area = mask.area(queries, keys, head=h)
        assert (area if isinstance(area, list) else [area] * batch) == count
        drawn = mask.draw(queries, keys, row=1, head=h)
        assert drawn.count("■") == count[1]
        assert torch.equal(_covered(mask, queries, keys, 1, h), cells[1, h].long())


def test_plain_masks_stay_plain() -> None:
    assert Mask.causal() & Mask.window(4) == Mask.band(3, 0)
    assert (Mask.full() & Mask.causal()).is_causal(9, 9)
    assert not Mask.causal().is_causal(4, 9)
    assert Mask.causal().sdpa(5, 5) == {"is_causal": True}
    assert Mask.full().sdpa(5, 5) == {}
    assert (Mask.causal() & Mask.window(99)).is_causal(50, 50)
    assert Mask.causal().is_full(1, 9)  # one query at the end sees every key
    assert Mask.padding(torch.ones(2, 6, dtype=torch.bool)).is_full(6, 6)


def test_areas_in_closed_form() -> None:
    assert Mask.causal().area(1000, 1000) == 1000 * 1001 // 2
    assert Mask.causal().area(10, 1000) == 10 * 990 + 55
    assert (Mask.causal() & Mask.window(100)).area(1000, 1000) == 100 * 101 // 2 + 900 * 100
    assert Mask.documents([300, 500, 200]).area(1000, 1000) == 300**2 + 500**2 + 200**2


def test_large_masks_are_never_built() -> None:
    """The grid of a million tokens would be a terabyte as a matrix."""
    grid = (Mask.causal() & Mask.window(4096)).grid(2**20, 2**20, 4096, 4096)
    assert int((grid > 0).sum()) == 256 + 255


def test_drawing() -> None:
    assert Mask.window(2).draw(3) == "■ ■ ⬚\n■ ■ ■\n⬚ ■ ■"


def test_bad_masks() -> None:
    with pytest.raises(ValueError, match="at least 1 position"):
        Mask.window(0)
    with pytest.raises(ValueError, match="must be positive"):
        Mask.documents([3, 0])
    with pytest.raises(ValueError, match="additive one is a bias"):
        Mask.dense(torch.zeros(2, 2))


def test_negative_ids_see_nothing() -> None:
    mask = Mask.segments(torch.tensor([0, 0, -1, 1]))
    assert mask.draw(4).splitlines()[2] == "⬚ ⬚ ⬚ ⬚"


@pytest.mark.parametrize("queries, keys", [(0, 20), (0, 0), (1, 20)])
def test_calls_without_queries_or_keys(queries: int, keys: int) -> None:
    for name, mask in masks(2, queries, keys).items():
        if mask is None:
            continue
        assert mask.block_mask(queries, keys).to_dense().shape[2:] == (-(-queries // 128), keys > 0)
        if min(queries, keys) == 0:
            assert not mask.grid(queries, keys, 8, 8).any(), name
            assert mask.area(queries, keys) in (0, [0, 0]), name


def test_a_rule_that_holds_what_lies_elsewhere() -> None:
    """Its answers come to where they are asked for."""

    class Elsewhere(torch.Tensor):
        asked = 0

        def to(self, *args: object, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
            Elsewhere.asked += 1
            return self.as_subclass(torch.Tensor)

    mask = Mask.predicate(lambda b, h, i, j: (i >= j).as_subclass(Elsewhere))
    both = mask & Mask.window(3)
    assert type(both.cells(9, 9)) is torch.Tensor and Elsewhere.asked == 1


def test_a_decoding_step_evaluates_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one query every block is ragged; those that are known to be full need no look."""
    mask = Mask.causal() & Mask.padding(torch.arange(4096)[None] >= torch.tensor([[0], [300]]))
    looks: list[int] = []
    cells = type(mask).cells
    monkeypatch.setattr(
        type(mask), "cells", lambda self, *a, **k: looks.append(1) or cells(self, *a, **k)
    )
    block = mask.block_mask(1, 4096)
    assert len(looks) == 3
    dense = block.to_dense()
    assert dense[0].all() and not dense[1, ..., :2].any() and dense[1, ..., 2:].all()


def test_some_heads_of_a_mask() -> None:
    for name, mask in by_head(2, 4, 37, 53).items():
        some = mask.of_heads([3, 1])
        true = mask.cells(37, 53).expand(2, 4, 37, 53)[:, [3, 1]]
        assert torch.equal(some.cells(37, 53).expand(2, 2, 37, 53), true), name
    assert Mask.causal().of_heads([1]) == Mask.causal()


def test_the_last_block_mask_is_kept_with_the_mask_itself() -> None:
    mask = Mask.segments(torch.arange(300)[None] // 100)
    first = mask.block_mask(300, 300)
    assert mask.block_mask(300, 300) is first
    other = mask.block_mask(200, 300)
    assert other is not first and other.seq_lengths == (200, 300)
    assert mask.block_mask(300, 300).to_dense().equal(first.to_dense())
    sent = pickle.loads(pickle.dumps(mask))
    assert sent.cells(300, 300).equal(mask.cells(300, 300))
