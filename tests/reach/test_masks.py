"""transformers' mask functions are read right, and what is not known is asked."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils as mu

from regard.core import Mask
from regard.reach.masks import from_mask_function

PAD = torch.arange(12)[None] >= torch.tensor([[0], [4]])
GROUPS = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, -1, -1, -1, -1]]).expand(2, -1)
PACKED = torch.tensor([[0] * 5 + [1] * 7]).expand(2, -1)
POSITIONS = torch.tensor([[*range(5), *range(7)]]).expand(2, -1)

KNOWN = {
    "causal": mu.causal_mask_function,
    "bidirectional": mu.bidirectional_mask_function,
    "sliding": mu.sliding_window_causal_mask_function(4),
    "sliding both ways": mu.sliding_window_bidirectional_mask_function(3),
    "chunked": mu.chunked_causal_mask_function(5, torch.tensor([0, 3])),
    "padding": mu.and_masks(mu.causal_mask_function, mu.padding_mask_function(PAD)),
    "packed": mu.and_masks(mu.causal_mask_function, mu.packed_sequence_mask_function(PACKED)),
    "blocks": mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(GROUPS)),
}

if hasattr(mu, "packed_sequence_compatibility_function"):  # transformers 5.23
    KNOWN["packed, remapped"] = mu.packed_sequence_compatibility_function(
        mu.causal_mask_function, POSITIONS, PACKED
    )


def said(fn: object, queries: int, keys: int, first: int, start: int) -> torch.Tensor:
    return mu.sdpa_mask(
        2, queries, keys, first, start, fn, allow_is_causal_skip=False, use_vmap=False
    )[:, 0]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(
    "queries, keys, first, start", [(12, 12, 0, 0), (1, 12, 11, 0), (3, 9, 9, 3)]
)
def test_known_functions_become_descriptions(
    name: str, queries: int, keys: int, first: int, start: int
) -> None:
    fn = KNOWN[name]
    mask = from_mask_function(fn, 2, queries, keys, first, start)
    cells = mask.cells(queries, keys)[:, 0].expand(2, -1, -1)
    assert torch.equal(cells, said(fn, queries, keys, first, start))
    assert type(mask).__name__ != "Rule"


def test_unknown_functions_are_asked() -> None:
    def odd(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & ((i + j) % 2 == 0)

    for fn, vmap in ((odd, False), (mu.and_masks(mu.causal_mask_function, odd), True)):
        mask = from_mask_function(fn, 2, 5, 9, 4, 0, vmap)
        assert type(mask).__name__ == "Rule"
        want = (Mask.causal() & Mask.predicate(odd)).cells(5, 9)[0, 0]
        assert torch.equal(mask.cells(5, 9)[0, 0], want)


def test_a_function_that_only_looks_known_wins() -> None:
    def sliding_window_overlay(sliding_window: int) -> object:
        def inner(
            b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
        ) -> torch.Tensor:
            return j > i - sliding_window - 3  # not what the name says

        return inner

    fn = sliding_window_overlay(4)
    fn.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"  # type: ignore[attr-defined]
    mask = from_mask_function(fn, 1, 12, 12)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    assert torch.equal(mask.cells(12, 12)[0, 0], j > i - 7)
