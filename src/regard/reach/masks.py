"""transformers' mask functions, read as a `Mask`.

The factories compose small closures (causal, sliding window, packed documents, ...). Those we know
become a description, so that no matrix is built and empty blocks cost nothing; any other stays a
rule that is asked tile by tile. What was read is compared with the function itself at sampled
positions: on a difference the function wins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from regard.core import Mask

MaskFunction = Callable[..., Any]


def from_mask_function(
    fn: MaskFunction,
    batch: int,
    queries: int,
    keys: int,
    query_offset: int = 0,
    key_offset: int = 0,
    vmap: bool = False,
    device: Any = None,
) -> Mask:
    """The rule `fn(batch, head, query, key)` on absolute positions, in the frame of the call's
    keys.
    """
    rule = _indexed(fn, vmap)
    # the frame puts the last query on the last key; a rule that sits elsewhere (a cross mask) is
    # asked directly
    shift = query_offset - key_offset - (keys - queries)

    def ask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return rule(b, h, i + shift + key_offset, j + key_offset)

    known = _read(fn, keys, key_offset) if shift == 0 else None
    if fn is masking_utils.bidirectional_mask_function:
        return Mask.full()
    if known is not None and _agree(known, ask, batch, queries, keys, device):
        return known
    return Mask.predicate(ask, batch)


def _read(fn: MaskFunction, keys: int, start: int) -> Mask | None:
    """The description of a known function, None for an unknown one."""
    if fn is masking_utils.causal_mask_function:
        return Mask.causal()
    if fn is masking_utils.bidirectional_mask_function:
        return Mask.full()
    kind = getattr(fn, "__qualname__", "").split(".")[0]
    held = _closure(fn)
    positions = torch.arange(start, start + keys)
    if kind in ("and_masks", "or_masks"):
        parts = [_read(f, keys, start) for f in held["mask_functions"]]
        if any(p is None for p in parts):
            return None
        mask = parts[0]
        for part in parts[1:]:
            mask = mask & part if kind == "and_masks" else mask | part  # type: ignore[operator]
        return mask
    if kind == "sliding_window_overlay":
        return Mask.band(held["sliding_window"] - 1, None)
    if kind == "sliding_window_bidirectional_overlay":
        return Mask.window(held["sliding_window"] + 1)
    if kind == "chunked_overlay":
        left = held["left_padding"].cpu()[:, None]
        return Mask.segments(
            torch.div(positions - left, held["chunk_size"], rounding_mode="floor") + keys
        )
    if kind == "packed_sequence_mask_function":
        return _segments(held["packed_sequence_mask"], keys, start)
    if kind == "remap_positions_for_packed_sequence":
        return _read(
            held["mask_function"], keys, start
        )  # within a document positions count on one by one
    if kind == "blockwise_overlay":
        return _segments(held["block_sequence_ids"], keys, start)
    if kind == "padding_mask_function":
        valid = held["padding_mask"]
        return (
            Mask.padding(valid[:, start : start + keys]) if valid.shape[1] >= start + keys else None
        )
    return None


def _segments(ids: Tensor, keys: int, start: int) -> Mask | None:
    return (
        Mask.segments(ids.cpu()[:, start : start + keys]) if ids.shape[1] >= start + keys else None
    )


def _closure(fn: MaskFunction) -> dict[str, Any]:
    names = getattr(getattr(fn, "__code__", None), "co_freevars", ())
    cells = getattr(fn, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells)}


def _indexed(fn: MaskFunction, vmap: bool) -> MaskFunction:
    """The function on index tensors that broadcast; one written for single indices is mapped
    over them.
    """
    if not vmap:
        return fn

    def mapped(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        shape = torch.broadcast_shapes(b.shape, h.shape, i.shape, j.shape)
        flat = [x.expand(shape).reshape(-1) for x in (b, h, i, j)]
        with TransformGetItemToIndex():
            return torch.vmap(fn)(*flat).reshape(shape)

    return mapped


def _agree(
    mask: Mask,
    ask: MaskFunction,
    batch: int,
    queries: int,
    keys: int,
    device: Any,
    samples: int = 24,
) -> bool:
    """Whether description and function say the same at sampled rows and columns, corners and
    diagonal included.
    """
    i = torch.linspace(0, queries - 1, min(samples, queries)).round().long() + keys - queries
    j = torch.cat(
        [
            torch.linspace(0, keys - 1, min(samples, keys)).round().long(),
            i.clamp_min(0),
            (i - 1).clamp_min(0),
        ]
    ).unique()
    i, j = i.to(device), j.to(device)
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    expected = ask(b, h, i[None, None, :, None], j[None, None, None]).expand(
        batch, 1, len(i), len(j)
    )
    read = mask._cells(i, j, (queries, keys)).expand(batch, 1, len(i), len(j))
    return bool((expected == read).all())
