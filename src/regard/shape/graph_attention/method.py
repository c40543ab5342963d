"""Graph-aware attention: GIN, PNA and differential mixers; a head of any model as a graph.

Paper: "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", Buehler, 2025,
https://arxiv.org/abs/2501.02393; official code: https://github.com/lamm-mit/Graph-Aware-Transformers.

Deviations:
- A query of "top_k" keeps a tenth of the keys that it sees, not of the whole length: a token's
  edges must not depend on how many tokens follow.
- Thresholds are fixed, not learned; PNA has softmax weights, and no neighbour picked by its norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from regard.core import Mask
from regard.core.kernels.tiled import Tiles
from regard.errors import InputError
from regard.reach import Call, Handler, Session, Site

__all__ = ["HeadGraph", "head_graph"]

MOST = 400  # edges that a picture can show


class HeadGraph(Handler):
    """Keeps the edges of one head: (query, key, weight) above a threshold, tile by tile."""

    def __init__(self, layer: int, head: int, threshold: float) -> None:
        if not 0 < threshold < 1:
            raise InputError(f"threshold lies between 0 and 1, not {threshold}")
        self.layer, self.head, self.threshold = layer, head, threshold
        self.edges: list[tuple[int, int, float]] = []
        self.tokens = 0

    def sites(self, sites: list[Site]) -> list[Site]:
        chosen = [s for s in sites if s.kind == "self" and s.layer == self.layer]
        if not chosen:
            raise InputError(f"there is no layer {self.layer} of self-attention in this model")
        return chosen[-1:]

    def after(self, call: Call, state: Any) -> None:
        if not 0 <= self.head < call.q.shape[1]:
            raise InputError(f"head {self.head} is out of range: there are {call.q.shape[1]}")
        group = call.q.shape[1] // call.k.shape[1]
        q = call.q[:1, self.head, None]
        k = call.k[:1, self.head // group, None]
        lse = state.lse[:1, self.head, None]
        mask: Mask = call.mask.of_heads([self.head])
        bias = None if call.bias is None else call.bias[:1, :1]
        if call.bias is not None and call.bias.shape[1] > 1:
            bias = call.bias[:1, self.head, None]
        self.edges, self.tokens = [], call.k.shape[2]
        shift = call.k.shape[2] - call.q.shape[2]
        for tile in Tiles(q, k, mask, call.scale, call.softcap, bias, lse=lse):
            tile.exponentiate()
            p = tile.p[0, 0, 0]
            for row, col in (p > self.threshold).nonzero().tolist():
                i, j = row + tile.rows.start + shift, col + tile.cols.start
                self.edges.append((i, j, float(p[row, col])))


def head_graph(
    model: Any,
    ids: Tensor,
    layer: int,
    head: int,
    *,
    threshold: float = 0.1,
    tokens: Sequence[str] | None = None,
) -> Any:
    """One head's attention on a text as a `networkx.DiGraph`: an edge from each key to a query
    that looks at it by more than `threshold`, with its weight.

    A row sums to 1, so that a token has fewer than 1 / threshold neighbours, and there is no map.

    >>> import torch
    >>> from regard.zoo.tiny import tiny
    >>> graph = head_graph(tiny("llama"), torch.arange(1, 9)[None], layer=0, head=0)
    >>> graph.number_of_nodes()
    8

    Raises:
        InputError: a layer, head or threshold out of range, more than one row, or no networkx.
    """
    import torch

    try:
        import networkx
    except ImportError:
        raise InputError("graphs need networkx: pip install networkx") from None
    if ids.dim() != 2 or len(ids) != 1:
        raise InputError(f"a graph is of one text, [1, tokens], not {tuple(ids.shape)}")
    keeper = HeadGraph(layer, head, threshold)
    with torch.no_grad(), Session(model, [keeper]):
        model(input_ids=ids)
    graph = networkx.DiGraph()
    names = [str(n) for n in range(keeper.tokens)] if tokens is None else list(tokens)
    graph.add_nodes_from((n, {"token": names[n]}) for n in range(keeper.tokens))
    graph.add_weighted_edges_from((j, i, w) for i, j, w in keeper.edges)
    return graph


def picture(graph: Any, most: int = MOST) -> str:
    """The graph as an SVG: tokens on a line, its heaviest edges as arcs; at most `most` of them."""
    from html import escape

    count = max(graph.number_of_nodes(), 1)
    width = 16 * count
    heaviest = sorted(graph.edges(data="weight"), key=lambda e: -e[2])[:most]
    far = max((abs(a - b) for a, b, _ in heaviest), default=1)
    top = 8 * far + 10
    arcs = []
    for a, b, weight in heaviest:
        x, y, r = 16 * a + 8, 16 * b + 8, 8 * abs(a - b)
        if a != b:
            arcs.append(
                f'<path d="M{x} {top}A{r} {r} 0 0 {int(b > a)} {y} {top}" fill="none" '
                f'stroke="currentColor" stroke-opacity="{min(1.0, weight):.2f}"/>'
            )
        else:
            arcs.append(
                f'<circle cx="{x}" cy="{top}" r="3" fill-opacity="{min(1.0, weight):.2f}"/>'
            )
    words = "".join(
        f'<text x="{16 * n + 8}" y="{top + 8}" transform="rotate(60 {16 * n + 8} {top + 8})" '
        f'font-size="11">{escape(str(data["token"]))}</text>'
        for n, data in graph.nodes(data=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 60} {top + 90}" '
        f'role="img"><title>attention of a head as a graph</title>{"".join(arcs)}{words}</svg>'
    )
