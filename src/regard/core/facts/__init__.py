"""Facts of the attention matrix P, exact, without the matrix.

Two ways lead to the same numbers. `measure` visits the probabilities tile by tile, once, for any
number of facts: the way of `regard.watch`. `identities` holds the same facts as calls of `attend`:
they carry gradients and run on whatever kernel `attend` chooses.

Every fact is a small class that says how one tile changes its sums (`add`), how the sums of a
later call with a cache join those of earlier calls (`extend`: decoding token by token gives what
one forward gives), and what the sums mean (`finish`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.core import identities
from regard.core.attend import attend
from regard.core.kernels import Inputs, rows
from regard.core.kernels.inputs import scale_of
from regard.core.kernels.tiled import Tile, Tiles
from regard.core.mask import Mask
from regard.core.precision import as_given
from regard.core.state import State
from regard.errors import InputError

from .base import Fact, Sums, View
from .cells import Columns, Rows, Thumbnail, TopKeys
from .keys import Influence, MeanReceived, Received
from .queries import (
    Collision,
    Distance,
    Entropy,
    LogSumExp,
    Mass,
    MaxLogit,
    WindowedDistance,
)
from .sweep import sweep

FACTS: dict[str, type[Fact]] = {
    f.name: f
    for f in (
        Received,
        MeanReceived,
        Influence,
        Entropy,
        Distance,
        WindowedDistance,
        Mass,
        Collision,
        MaxLogit,
        LogSumExp,
        TopKeys,
        Rows,
        Columns,
        Thumbnail,
    )
}


def measure(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    facts: Sequence[Fact],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    live: Tensor | None = None,
    offsets: tuple[int, int] = (0, 0),
) -> list[Sums]:
    """Sums of every fact from one pass over the tiles of P; `fact.finish(sums)` gives the result.

    Args:
        lse: `[batch, heads, queries]` of the same call, as `attend` gives it.
        sinks: learned sink logit of each head, `[heads]`, which the lse holds too.
        live: `[batch, queries]`, false for queries that do not count (padding).
        offsets: absolute position of the first query and of the first key.

    No gradients; needs a few MiB beside the results, whatever the length (on a GPU a few hundred,
    where a fact is none that the sweep of the Triton kernel gives).
    """
    with torch.no_grad(), as_given(q):
        scale = scale_of(q, scale)
        inputs = Inputs(q, k, k, mask, scale, softcap, bias)
        _check(inputs, lse, sinks, live)
        lse, view = _counted(lse, live), _view(inputs, offsets)
        plain = softcap is None and bias is None
        done: list[Sums | None] = [None] * len(facts)
        if plain:
            done = _on_gpu(facts, q, k, lse, mask, scale, view)
        rest = [f for f, sums in zip(facts, done) if sums is None]
        if rest:  # the plan of the tiles takes a while on long calls
            near = [f.near for f in rest if f.near is not None]
            if len(near) == len(rest):
                mask = (mask or Mask.full()) & Mask.band(max(near), max(near))
            tiles = Tiles(q, k, mask, scale, softcap, bias, lse=lse)
            left = iter(_by_tiles(rest, tiles, live, view))
            done = [next(left) if sums is None else sums for sums in done]
        return _completed(facts, [sums for sums in done if sums is not None], lse, sinks, view)


def attend_and_measure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    facts: Sequence[Fact],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    live: Tensor | None = None,
    offsets: tuple[int, int] = (0, 0),
) -> tuple[State, list[Sums]]:
    """What `attend` and then `measure` give, in one sweep over the scores where that is faster.

    On a CPU, for up to 32k keys and where nothing asks for a gradient, scores are computed once;
    elsewhere this is the two calls. Arguments are those of `attend` and `measure`.

    >>> q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    >>> state, sums = attend_and_measure(q, k, v, [Received()], mask=Mask.causal())
    >>> round(Received().finish(sums[0]).sum().item(), 3)  # 2 heads x 6 queries
    12.0
    """
    inputs = Inputs(q, k, v, mask, scale_of(q, scale), softcap, bias)
    asked = _asks(*(t for t in (q, k, v, bias, sinks) if t is not None))
    by_query = sinks is not None and sinks.dim() == 3
    if asked or by_query or rows.why_not(inputs):
        call: Any = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias}
        state = attend(q, k, v, sinks=sinks, **call)
        return state, measure(
            q, k, state.lse, facts, sinks=sinks, live=live, offsets=offsets, **call
        )
    with torch.no_grad(), as_given(q):
        _check(inputs, None, sinks, live)
        view = _view(inputs, offsets)
        sums = [f.begin(view) for f in facts]

        def visit(tile: Tile) -> None:
            _add(facts, sums, tile, view)

        log_p = any(f.log_p for f in facts)
        out, lse = rows.sweep(inputs, visit, log_p=log_p, sinks=sinks, live=live)
        sums = _completed(facts, sums, _counted(lse, live), sinks, view)
        return State(out.to(q.dtype), lse), sums


def _view(inputs: Inputs, offsets: tuple[int, int]) -> View:
    q, k, mask = inputs.q, inputs.k, inputs.mask
    return View(
        q.shape[0],
        k.shape[1],
        q.shape[1] // k.shape[1],
        q.shape[2],
        k.shape[2],
        *offsets,
        torch.float64 if q.dtype == torch.float64 else torch.float32,
        q.device,
        mask is not None and mask.heads > 1,
    )


def _counted(lse: Tensor, live: Tensor | None) -> Tensor:
    """The lse, -inf for queries that do not count."""
    return lse if live is None else lse.masked_fill(~live[:, None], -torch.inf)


def _completed(
    facts: Sequence[Fact], sums: list[Sums], lse: Tensor, sinks: Tensor | None, view: View
) -> list[Sums]:
    return [f.start(f.complete(s, lse, sinks, view), view) for f, s in zip(facts, sums)]


def _check(inputs: Inputs, lse: Tensor | None, sinks: Tensor | None, live: Tensor | None) -> None:
    inputs.check()
    batch, heads, queries, _ = inputs.q.shape
    if lse is not None and lse.shape != (batch, heads, queries):
        raise InputError(f"lse {tuple(lse.shape)} is not {(batch, heads, queries)}, one a query")
    if sinks is not None and sinks.shape not in ((heads,), inputs.q.shape[:3]):
        raise InputError(
            f"sinks {tuple(sinks.shape)} are not [{heads}], one a head, nor one a query"
        )
    if live is not None and (live.dtype != torch.bool or live.shape != (batch, queries)):
        raise InputError(
            f"live is boolean {(batch, queries)}, false for queries that do not count, not "
            f"{live.dtype} {tuple(live.shape)}"
        )


def _on_gpu(
    facts: Sequence[Fact],
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Mask | None,
    scale: float,
    view: View,
) -> list[Sums | None]:
    """What one sweep of a GPU program gives; without one, all facts by identities, if all can."""
    if q.device.type == "cpu":
        return [None] * len(facts)
    swept = sweep(facts, q, k, lse, mask, scale, view)
    if any(sums is not None for sums in swept):
        return swept
    sums = [f.fused(q, k, lse, mask, scale) for f in facts]
    if any(s is None for s in sums):
        return [None] * len(facts)
    groups = (view.kv_heads, view.groups)
    return [{"sum": s.to(view.dtype).unflatten(1, groups)} for s in sums if s is not None]


def _by_tiles(facts: Sequence[Fact], tiles: Tiles, live: Tensor | None, view: View) -> list[Sums]:
    """The facts from one pass over the tiles."""
    sums = [f.begin(view) for f in facts]
    room = tiles.empty() if any(f.log_p for f in facts) else None
    for tile in tiles:
        tile.exponentiate(room)
        if live is not None:
            tile.live = live[tile.batch, tile.rows]
            tile.p.mul_(tile.live[:, None, None, :, None])  # exactly 0, not e to a large power
        _add(facts, sums, tile, view)
    return sums


def _add(facts: Sequence[Fact], sums: list[Sums], tile: Tile, view: View) -> None:
    for fact, total in zip(facts, sums):
        part = tile if fact.near is None else tile.within(fact.near)
        if part is not None:
            fact.add(total, part, view)


def received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    weights: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Attention each key receives, sum_i w_i P_ij: float32 `[batch, heads, keys]`.

    Args:
        q: `[batch, heads, queries, head_dim]`; k: `[batch, kv_heads, keys, head_dim]`.
        lse: `[batch, heads, queries]` of the same call, from `attend(...).lse`.
        weights: per-query weights w `[batch, heads, queries]` (or broadcast), of any sign.
        kernel: "tiles" (no weights, no gradients), "fused" (an attention call with the roles
            swapped) or "triton" (one GPU program per block of keys; no gradients); chosen by
            device, mask and gradients when None.

    Carries gradients to q, k, lse and weights where one of them asks for it.

    Raises:
        ValueError: a kernel that cannot compute this call, or not here.

    >>> q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    >>> state = attend(q, k, k, mask=Mask.causal())
    >>> total = received(q, k, state.lse, mask=Mask.causal())
    >>> round(total.sum().item(), 3)  # 2 heads x 6 queries
    12.0
    """
    if kernel is None:
        kernel = "tiles" if weights is None and _tiled(q, k, lse) else "fused"
        if q.is_cuda and not _asks(q, k, lse, *([] if weights is None else [weights])):
            from regard.core.kernels import triton

            fits = triton.available() is None and triton.supports(q, k, mask)
            kernel = "triton" if fits else kernel
    if kernel == "fused":
        return identities.received(q, k, lse, mask=mask, scale=scale, weights=weights)
    if kernel not in ("tiles", "triton"):
        raise InputError(f"unknown kernel {kernel!r}: choose one of tiles, fused, triton")
    if _asks(q, k, lse, *([] if weights is None else [weights])):
        raise InputError(f"kernel {kernel!r} carries no gradients: use 'fused' or torch.no_grad()")
    if kernel == "triton":
        return _triton(q, k, lse, mask, scale, weights)
    if weights is not None:
        raise InputError("kernel 'tiles' takes no weights: use 'fused'")
    # a choice of all queries: the same sums, but never by the fused call that GPUs take otherwise
    return _one(Received(queries=(0, q.shape[2])), q, k, lse, mask, scale)


def entropy(
    q: Tensor, k: Tensor, lse: Tensor, *, mask: Mask | None = None, scale: float | None = None
) -> Tensor:
    """Entropy of each query's attention in nats, float32 `[batch, heads, queries]`; 0 for no key.

    Carries gradients to q, k and lse where one of them asks for it.
    """
    if _tiled(q, k, lse):
        return _one(Entropy(), q, k, lse, mask, scale)
    return identities.entropy(q, k, lse, mask=mask, scale=scale)


def distance(
    q: Tensor, k: Tensor, lse: Tensor, *, mask: Mask | None = None, scale: float | None = None
) -> Tensor:
    """Expected distance |i - j| of what each query looks at, float32 `[batch, heads, queries]`.

    Carries gradients to q, k and lse where one of them asks for it.
    """
    if _tiled(q, k, lse):
        return _one(Distance(), q, k, lse, mask, scale)
    return identities.distance(q, k, lse, mask=mask, scale=scale)


def _tiled(*tensors: Tensor) -> bool:
    """Whether tiles are the better way: on a CPU, where nothing asks for a gradient."""
    return not _asks(*tensors) and tensors[0].device.type == "cpu"


def _asks(*tensors: Tensor) -> bool:
    """Whether a gradient is asked for."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _triton(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Mask | None,
    scale: float | None,
    weights: Tensor | None,
) -> Tensor:
    from regard.core.kernels import triton  # an import of half a second that few ask for

    reason = triton.available()
    if reason is not None:
        raise InputError(f"kernel 'triton' cannot run: {reason}; or leave kernel=None")
    if not triton.supports(q, k, mask):
        raise InputError(
            "kernel 'triton' takes GPU tensors of 32 or 16 bits, heads up to 256 wide, and masks "
            "made of bands and padding: leave kernel=None for this call"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return triton.received(q, k, lse, mask=mask, scale=scale, weights=weights)


def _one(
    fact: Fact, q: Tensor, k: Tensor, lse: Tensor, mask: Mask | None, scale: float | None
) -> Tensor:
    return fact.finish(measure(q, k, lse, [fact], mask=mask, scale=scale)[0])
