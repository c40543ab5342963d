"""A call cut down to some of its queries or keys, which every row of the batch picks for itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Mask, State, attend
from regard.reach.call import Call


@dataclass(frozen=True, eq=False)
class Picked(Mask):
    """A mask at picked queries and keys `[batch, picked]` of a call of `size` (queries, keys);
    `row_ok` and `column_ok` mark real picks, the others fill up.
    """

    inner: Mask
    size: tuple[int, int]
    picked_rows: Tensor
    picked_columns: Tensor
    row_ok: Tensor
    column_ok: Tensor

    @property
    def batch(self) -> int:  # type: ignore[override]
        return len(self.picked_rows)

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.inner.heads

    def _cells(self, i: Tensor, j: Tensor, size: tuple[int, int]) -> Tensor:
        at = i - (size[1] - size[0])
        rows = self.picked_rows[:, at] + self.size[1] - self.size[0]
        columns = self.picked_columns[:, j]
        cells = []
        for b in range(len(rows)):
            allowed = self.inner._cells(rows[b], columns[b], self.size)
            allowed = allowed.expand(-1, -1, rows.shape[1], columns.shape[1])
            cells.append(allowed[b if len(allowed) > 1 else 0])
        ok = self.row_ok[:, at, None] & self.column_ok[:, None, j]
        return torch.stack(cells) & ok[:, None]


def order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the chosen of `[batch, n]` in order, as many as the row with the most has, and
    which of them are real.

    >>> order(torch.tensor([[True, False, True], [False, True, False]]))
    (tensor([[0, 2],
            [1, 0]]), tensor([[ True,  True],
            [ True, False]]))
    """
    count = chosen.sum(-1)
    most = int(count.max()) if len(count) else 0
    places = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)[:, :most]
    return places, torch.arange(most, device=chosen.device) < count[:, None]


def take_queries(call: Call, chosen: Tensor) -> tuple[Call, Tensor, Tensor]:
    """The call with the chosen queries `[batch, queries]` alone; their places and which are real,
    both `[batch, picked]`.
    """
    places, ok = order(chosen)
    q = _along(call.q, places, 2)
    bias = None if call.bias is None else _along(_whole(call.bias, call), places, 2)
    return call.change(q=q, mask=_picked(call, rows=(places, ok)), bias=bias, live=ok), places, ok


def over(call: Call, chosen: Tensor) -> State:
    """State of the call over the chosen keys `[batch, keys]` alone, without learned sinks."""
    places, ok = order(chosen)
    if not places.shape[1]:
        lse = call.q.new_full(call.q.shape[:3], -torch.inf, dtype=_work(call.q))
        return State(call.q.new_zeros(*call.q.shape[:3], call.v.shape[-1]), lse)
    k, v = _along(call.k, places, 2), _along(call.v, places, 2)
    bias = None if call.bias is None else _along(_whole(call.bias, call), places, 3)
    mask = _picked(call, columns=(places, ok))
    # a few queries need no tiles
    kernel = "reference" if call.q.shape[2] == 1 else None
    return attend(
        call.q, k, v, mask=mask, scale=call.scale, softcap=call.softcap, bias=bias, kernel=kernel
    )


def put(whole: Tensor, part: Tensor, places: Tensor, ok: Tensor) -> Tensor:
    """`whole` `[batch, heads, queries, ...]` with `part` at the real ones of the places."""
    merged = whole.clone()
    for b in range(len(places)):
        merged[b, :, places[b][ok[b]]] = part[b, :, ok[b]].to(merged.dtype)
    return merged


def _picked(
    call: Call,
    rows: tuple[Tensor, Tensor] | None = None,
    columns: tuple[Tensor, Tensor] | None = None,
) -> Picked:
    size = (call.q.shape[2], call.k.shape[2])
    batch, device = len(call.q), call.q.device

    def every(n: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(n, device=device).expand(batch, n)
        return places, torch.ones_like(places, dtype=torch.bool)

    (r, r_ok), (c, c_ok) = rows or every(size[0]), columns or every(size[1])
    return Picked(call.mask, size, r, c, r_ok, c_ok)


def _along(x: Tensor, places: Tensor, axis: int) -> Tensor:
    shape = [len(places), 1, 1, 1]
    shape[axis] = places.shape[1]
    target = list(x.shape)
    target[axis] = places.shape[1]
    return x.gather(axis, places.view(shape).expand(target))


def _whole(bias: Tensor, call: Call) -> Tensor:
    return bias.expand(len(call.q), *bias.shape[1:])


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
