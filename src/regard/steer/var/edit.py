"""The edit of VAR on the rows of one call, and what it leaves behind of a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.core import State, mass
from regard.parts.decoding.picks import over
from regard.reach import Call

from .card import Settings
from .dims import EPS


@dataclass
class LayerSinks:
    """What VAR saw in one layer.

    Attributes:
        sinks: `[batch, tokens]`, the sink tokens, padding left out.
        image: `[batch, tokens]`, the image tokens.
        chosen: one tensor a call, `[batch, heads, queries]`: the rows whose attention was moved.
        moved: one tensor a call, `[batch, heads, queries]`: how much of it.
    """

    sinks: Tensor
    image: Tensor
    chosen: list[Tensor] = field(default_factory=list)
    moved: list[Tensor] = field(default_factory=list)


def redistribute(
    call: Call, state: State, image: Tensor, sinks: Tensor, settings: Settings
) -> tuple[State, Tensor, Tensor]:
    """The edit, exact, by the algebra of three partial States; the matrix is never formed.

    With the key groups VS (image sinks), TS (other sinks) and VN (image, no sinks), their masses w
    and outputs o, a selected row becomes `o - p (w_VS o_VS + w_TS o_TS) + p (w_VS + w_TS) o_VN`.

    Args:
        call: some queries; state: its State before the edit.
        image, sinks: `[batch, keys]`.

    Returns the State, which rows were selected and how much each moved, `[batch, heads, queries]`.
    """
    vs, ts, vn = (over(call, g) for g in (image & sinks, sinks & ~image, image & ~sinks))
    w_vs, w_ts, w_vn = (mass(s, state) for s in (vs, ts, vn))
    on_image, ratio = w_vs + w_vn, settings.nonsink_ratio or 0.0
    if settings.variant == "released":
        # its ratio has 1e-6 added for every image token
        enough = w_vs / (on_image + EPS * image.sum(-1)[:, None, None]) <= 1 - ratio
    else:
        enough = w_vn >= ratio * on_image
    if settings.heads == "all":
        chosen = on_image > 0
    else:
        chosen = (on_image >= settings.image_mass) & enough
    taker, w_taker = vn, w_vn
    if settings.give != "image":
        taker = over(call, ~sinks & ~image if settings.give == "text" else ~sinks)
        w_taker = mass(taker, state)
    chosen = chosen & (w_vn > 0) & (w_taker > 0)
    moved = settings.move * (w_vs + w_ts) * chosen
    out = state.out.to(moved.dtype)
    change = moved[..., None] * taker.out.to(moved.dtype)
    for part, w in ((vs, w_vs), (ts, w_ts)):
        change = change - (settings.move * w)[..., None] * part.out.to(moved.dtype)
    out = torch.where(chosen[..., None], out + change, out)
    return State(out.to(state.out.dtype), state.lse), chosen, moved


def at_queries(state: State, places: Tensor) -> State:
    """A State at the queries `places`, `[batch, picked]`.

    >>> one = State(torch.arange(6.0).view(1, 1, 3, 2), torch.zeros(1, 1, 3))
    >>> at_queries(one, torch.tensor([[2, 0]])).out
    tensor([[[[4., 5.],
              [0., 1.]]]])
    """
    index = places[:, None].expand(-1, state.lse.shape[1], -1)
    wide = index[..., None].expand(-1, -1, -1, state.out.shape[-1])
    return State(state.out.gather(2, wide), state.lse.gather(2, index))
