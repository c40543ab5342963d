"""The facts of a `Watch` as one dictionary for pages, notebooks, terminals and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.core import (
    Columns,
    Fact,
    Influence,
    Mass,
    Rows,
    Thumbnail,
    TopKeys,
    WindowedDistance,
)
from regard.errors import InputError
from regard.reach.sites import setting
from regard.versions import versions

from .heads import Heads, head_split, peaks
from .rows import table_of
from .sinks import EPSILON, hidden_sinks, sink_rate
from .tokens import pieces

BINS = 512
LISTED = 20_000  # values of a fact that JSON lists one by one
LINES = 8  # views of one fact that has several: rows, columns, segments
TAIL = 16  # the last tokens are seen by few queries, so what they receive on average says little
_BOTH_WAYS = "mean attention of all queries on this key, over layers and heads"
_ROW_HELP = "exact attention of this token on each key, mean over layers and heads"
_HELP = {
    "received": (
        "attention received",
        "mean attention of later queries on this key, over layers and heads",
        "share",
    ),
    "entropy": (
        "entropy",
        "entropy of this query's attention, mean over layers and heads",
        "nats",
    ),
    "distance": ("attention distance", "mean distance to the attended keys", "tokens"),
    "waad": (
        "windowed distance (WAAD)",
        "mean distance to the attended keys, clipped to the window, over layers and heads",
        "tokens",
    ),
    "fai": (
        "future influence (FAI)",
        "attention received from queries within a distance band, mean over layers and heads",
        "share",
    ),
    "received_sum": (
        "attention received, summed",
        "attention on this key summed over all queries, mean over layers and heads",
        "",
    ),
    "collision": (
        "collision",
        "probability that two draws of a key are equal, mean over layers and heads",
        "share",
    ),
    "max_logit": (
        "largest logit",
        "largest score of this query before the softmax, mean over layers and heads",
        "",
    ),
    "lse": (
        "log-sum-exp",
        "log of the summed exponentiated scores of this query, mean over layers and heads",
        "nats",
    ),
    "top": (
        "among the top keys",
        "attention of the chosen queries where this key is among their top k, mean over layers "
        "and heads",
        "share",
    ),
}


def live(seen: Any, axis: str) -> Tensor | None:
    """Which positions along the axis "queries" or "keys" of a fact are tokens, `[batch,
    positions]`; None where all are, for lack of padding.
    """
    record = seen.record
    if record.live is None or (axis == "keys" and record.site.kind == "cross"):
        return None
    known: Tensor = record.live.cpu()
    if axis == "keys":  # what a cache held before is taken for tokens
        known = torch.cat([known.new_ones(len(known), record.end - record.rows), known], 1)
    return known


def stack(seen: Any, name: str | Fact, row: int = 0) -> tuple[list[int], Tensor] | None:
    """One fact of one batch row over the layers of the main part: (layers, `[layers, heads,
    ...]`), without padding; None if not watched.
    """
    if name not in seen:
        return None
    fact = next(f for f in seen.facts if name in (f, f.name))
    layers = seen[fact]
    if not len(layers) or len({layers[n].shape for n in layers}) > 1:
        return None
    values = torch.stack([layers[n][row].float() for n in layers]).cpu()
    return list(layers), _without_padding(fact, values, seen, row)


def _without_padding(fact: Fact, values: Tensor, seen: Any, row: int) -> Tensor:
    """`[layers, heads, ...]` of the tokens of a row alone."""
    kept = live(seen, "queries" if fact.axis == "queries" else "keys")
    if kept is None:
        return values
    where = kept[row].nonzero()[:, 0]
    if isinstance(fact, Thumbnail):  # bins stay whole
        width = fact.width(kept.shape[1])
        bins = slice(int(where[0]) // width, int(where[-1]) // width + 1)
        return values[:, :, bins, bins]
    return values.index_select(3 if isinstance(fact, Rows) else 2, where)


class Table(list[dict[str, Any]]):
    """Rows that print as a table, in a terminal and in a notebook."""

    def __repr__(self) -> str:
        if not self:
            return "(no rows)"
        lines = [list(self[0]), *([_short(v) for v in row.values()] for row in self)]
        widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths)) for line in lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in (self[0] if self else ()))
        rows = ("".join(f"<td>{_short(v)}</td>" for v in row.values()) for row in self)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(seen: Any) -> Table:
    """One row a layer: the mean of each watched fact over batch, heads and tokens."""
    rows: dict[int, dict[str, Any]] = {}
    for fact in seen.facts:
        if fact.axis == "cells" or fact.name == "top":
            continue
        kept = live(seen, fact.axis)
        for layer, value in seen[fact].items():
            if kept is not None:
                value = value.cpu().transpose(1, 2)[kept]
            rows.setdefault(layer, {"layer": layer})[fact.name] = float(value.float().mean())
    return Table(rows[n] for n in sorted(rows))


def overview(
    seen: Any,
    *,
    tokens: Sequence[str] | None = None,
    row: int = 0,
    title: str | None = None,
    model_name: str | None = None,
    asked: Sequence[Sequence[int]] = (),
    **meta: Any,
) -> dict[str, Any]:
    """Everything the report shows, from the facts that were watched; what was not is left out.

    Args:
        seen: a `Watch` that has seen a forward or a generation.
        tokens: the pieces of the text; decoded with the tokenizer that `regard.load` brought when
            None.
        row: which row of the batch.
        asked: tokens whose rows, watched with `core.Rows`, are shown in words; each by the
            positions of its pieces.
        meta: further entries of the "meta" block (seconds, plain_seconds, peak_mib, notes,
            command).
    """
    text = seen.model.config.get_text_config()
    measured = (v[0] if f.name == "top" else v for f in seen.facts for v in seen[f].values())
    batch, heads = next((v.shape[:2] for v in measured), (1, 0))
    if not 0 <= row < batch:
        raise InputError(f"row {row} is out of range: the batch has {batch}, from 0")
    tokens = _tokens(seen, row, tokens)
    page: dict[str, Any] = {
        "meta": {
            "title": title or _title(tokens),
            "model": model_name or seen.model.config._name_or_path or type(seen.model).__name__,
            "num_layers": len(seen[seen.facts[0]]),
            "num_heads": heads,
            "num_key_value_heads": setting(text, "num_key_value_heads", heads) or heads,
            "num_tokens": len(tokens),
            "device": str(seen.model.device),
            "dtype": str(seen.model.dtype).removeprefix("torch."),
            "seconds": seen.seconds,
            "plain_seconds": None,
            "difference": seen.difference,
            "peak_mib": None,
            "facts": [f.name for f in seen.facts],
            "all_heads": seen.whole,
            "versions": versions(),
            "command": None,
            "notes": [],
            **meta,
        },
        "tokens": tokens,
        "views": {},
        "marks": {"preplan": [], "anchor": []},
    }
    alpha = stack(seen, "mean_received", row)
    if alpha is not None and alpha[1].shape[-1] > 1:
        page["views"]["received"] = _view("received", alpha[1].mean((0, 1)), len(tokens))
        tail = TAIL if seen.causal else 0  # where all tokens look both ways, none are few
        if not seen.causal:
            page["views"]["received"]["help"] = _BOTH_WAYS
        if tail and len(tokens) > 2 * tail:
            page["views"]["received"]["values"][-tail:] = [None] * tail
        page["sinks"] = _sinks(*alpha, tokens, tail=tail)
        page["by_position"] = _by_position(alpha[1])
    for fact in seen.facts:
        for name, values in _series(seen, fact, row).items():
            if len(values) == len(tokens) or seen.record.site.kind == "self":
                label = "received_sum" if fact.name == "received" else name  # a sum, no share
                page["views"].setdefault(name, _view(label, values, len(tokens)))
    entropy, distance = stack(seen, "entropy", row), stack(seen, "distance", row)
    if entropy is not None or distance is not None:
        page["heads"] = _heads(entropy, distance)
    _add_rhythm(page, seen, distance, row)
    _add_rows(page, seen, asked, row)
    shown = stack(seen, "thumbnail", row)
    if shown is not None:
        page["thumbnails"] = _thumbnails(seen, shown, alpha, entropy, distance)
    page["facts"] = [_block(seen, fact, row) for fact in seen.facts]
    return page


def _series(seen: Any, fact: Fact, row: int) -> dict[str, Tensor]:
    """What a fact says of each token, mean over layers and heads, by the name of the view."""
    if isinstance(fact, TopKeys):
        values, places = _top(seen, fact, row)
        total = torch.zeros(len(_places(seen, row)))
        in_text = places >= 0
        total.index_add_(0, places[in_text], values[in_text])
        return {"top": total / max(1, values.shape[:3].numel())}
    stacked = stack(seen, fact, row)
    if stacked is None or isinstance(fact, Thumbnail):
        return {}
    mean = stacked[1].mean((0, 1))
    if isinstance(fact, Rows):
        if len(fact.queries) >= seen.record.end > LINES:  # all of them: shown as they are asked for
            return {}
        kept = [n for n in fact.queries if n < seen.record.end]
        return {f"row of token {n}": line for n, line in list(zip(kept, mean))[:LINES]}
    if isinstance(fact, Columns):
        return {f"column of token {n}": mean[:, i] for i, n in enumerate(fact.keys[:LINES])}
    if isinstance(fact, Mass):
        return {f"share of {n}": mean[:, i] for i, n in enumerate(fact.segments[:LINES])}
    names = {"mean_received": "received", "influence": "fai"}
    if fact.name == "received" and "mean_received" in seen:
        return {"received_sum": mean}
    return {names.get(fact.name, fact.name): mean}


def _add_rows(page: dict[str, Any], seen: Any, asked: Sequence[Sequence[int]], row: int) -> None:
    """The rows that were asked for, and those of all tokens of a short text for a click."""
    facts = [f for f in seen.facts if isinstance(f, Rows)]
    if not facts or seen.record.site.kind != "self":
        return
    tokens = page["tokens"]
    page["rows"] = []
    for places in asked:
        layers = seen.rows(list(places), row=row)
        text = "".join(tokens[n] for n in places).strip()
        view = _view(f"what “{text}” looks at", layers.stack().mean((0, 1)).cpu(), len(tokens))
        page["views"] = {f"row of {places}": {**view, "help": _ROW_HELP}, **page["views"]}
        page["rows"].append(
            {"token": text, "positions": list(places), "layers": table_of(layers, tokens)}
        )
    stacked = stack(seen, facts[0], row)
    if stacked is not None and len(facts[0].queries) == seen.record.end == len(tokens):
        page["clicked"] = stacked[1].mean((0, 1)).double().round(decimals=4).tolist()


def _top(seen: Any, fact: TopKeys, row: int) -> tuple[Tensor, Tensor]:
    """Shares and tokens, `[layers, heads, queries, k]`; token -1 where there were fewer keys."""
    values, keys = (torch.stack([v[i][row] for v in seen[fact].values()]).cpu() for i in (0, 1))
    where = torch.tensor(_places(seen, row))
    place = torch.full((max(int(keys.max()), int(where.max())) + 2,), -1)  # the last for key -1
    place[where] = torch.arange(len(where))
    return values.float(), place[keys]


def _block(seen: Any, fact: Fact, row: int) -> dict[str, Any]:
    """One fact for JSON: all values where they are few, else their mean over layers and heads."""
    settings = json.loads(json.dumps(vars(fact)))  # tuples as lists
    block = {"name": fact.name, "settings": settings, "layers": list(seen[fact])}
    if isinstance(fact, TopKeys):
        values, places = _top(seen, fact, row)
        return {**block, "values": _plain(values), "tokens": places.tolist()}
    stacked = stack(seen, fact, row)
    if stacked is None:
        return block
    if stacked[1].numel() <= LISTED:
        return {**block, "values": _plain(stacked[1])}
    return {**block, "mean": _plain(stacked[1].mean((0, 1)))}


def _plain(values: Tensor) -> Any:
    return values.double().round(decimals=6).tolist()


def _view(name: str, values: Tensor, tokens: int) -> dict[str, Any]:
    """One colour of the text; tokens that a cache held before have no value of a query."""
    label, text, unit = _HELP.get(name, (name, "mean over layers and heads", "share"))
    unseen = [None] * (tokens - len(values))
    return {"label": label, "help": text, "unit": unit, "values": [*unseen, *_plain(values)]}


def _sinks(
    layers: list[int], alpha: Tensor, tokens: list[str], position: int = 0, tail: int = TAIL
) -> dict[str, Any]:
    """Sink map of the first position, and the later tokens that are sinks of some heads."""
    batch = alpha[None]
    sinks = hidden_sinks(batch, after=position, tail=tail)[:12]
    hidden = [
        {**{n: f[n] for n in ("position", "heads", "alpha")}, "token": tokens[f["position"]]}
        for f in sinks
    ]
    return {
        "epsilon": EPSILON,
        "position": position,
        "alpha": alpha[:, :, position].tolist(),
        "layers": layers,
        "rate": sink_rate(batch, EPSILON, position),
        "hidden": hidden,
    }


def _by_position(alpha: Tensor) -> dict[str, Any]:
    """Mean received attention by position, over the heads of all layers, averaged within bins."""
    flat = alpha.flatten(0, 1)
    tokens = flat.shape[1]
    coarse = torch.logspace(0, 1, BINS, base=max(tokens, 2)).long() - 1
    edges = torch.cat([torch.arange(min(64, tokens)), coarse.clamp_max(tokens - 1)])
    edges = torch.unique(edges)[: BINS * 2]
    columns = {
        "mean": flat.mean(0),
        "median": flat.median(0).values,
        "p90": flat.quantile(0.9, dim=0),
        "max": flat.amax(0),
    }
    bounds = [*edges.tolist(), tokens]
    spans = list(pairwise(bounds))
    binned = {n: [float(c[a:b].mean()) for a, b in spans] for n, c in columns.items()}
    return {"position": edges.tolist(), **binned}


def _heads(entropy: Any, distance: Any) -> dict[str, Any]:
    block: dict[str, Any] = {"layers": (entropy or distance)[0]}
    if entropy is not None:
        block["entropy"] = entropy[1].mean(-1).tolist()
    if distance is not None:
        block["distance"] = distance[1].mean(-1).tolist()
        single = distance[1].shape[:2].numel() < 2
        split = Heads((), ()) if single else head_split(distance[1].mean(-1), distance[0])
        block["local"] = [list(pair) for pair in split.local]
        block["global"] = [list(pair) for pair in split.far]
    return block


def _add_rhythm(page: dict[str, Any], seen: Any, distance: Any, row: int) -> None:
    """WAAD of the local and FAI of the global heads, with their peaks (Li et al., 2025)."""
    waad, fai = stack(seen, "waad", row), stack(seen, "influence", row)
    if distance is None or waad is None or fai is None or not seen.causal:
        return
    tokens = waad[1].shape[-1]  # fewer than keys where the first tokens were read before
    if distance[1].shape[:2].numel() < 2 or tokens < 8 or tokens != fai[1].shape[-1]:
        return
    rows = list(range(len(distance[0])))
    split = head_split(distance[1].mean(-1), rows)
    window = next(f.window for f in seen.facts if isinstance(f, WindowedDistance))
    band = next(f.band for f in seen.facts if isinstance(f, Influence)) or (0, 0)
    back = torch.stack([waad[1][pair] for pair in split.local]).mean(0)
    ahead = torch.stack([fai[1][pair] for pair in split.far]).mean(0)
    known = max(0, len(ahead) - band[0])  # the last tokens have no token that far ahead
    page["views"]["waad"] = _view("waad", back, len(back)) | {
        "help": "mean distance of the local heads, clipped to the window: peaks begin a new chunk"
    }
    page["views"]["fai"] = _view("fai", ahead, len(ahead)) | {
        "help": "attention received from the global heads within a distance band: peaks are anchors"
    }
    page["views"]["fai"]["values"][known:] = [None] * (len(ahead) - known)
    page["marks"] = {"preplan": peaks(back), "anchor": peaks(ahead[:known])}
    page["rhythm"] = {
        "position": list(range(len(back))),
        "waad": page["views"]["waad"]["values"],
        "fai": page["views"]["fai"]["values"],
        "window": window,
        "horizon": list(band),
    }


def _thumbnails(
    seen: Any, shown: Any, alpha: Any, entropy: Any, distance: Any
) -> list[dict[str, Any]]:
    """Maps of up to six heads: the extremes of sink share, distance and entropy."""
    layers, cells = shown
    reasons: list[tuple[str, Tensor]] = []
    if alpha is not None:
        sink = alpha[1][:, :, 0]
        reasons += [("strongest sink", sink), ("weakest sink", -sink)]
    if distance is not None:
        span = distance[1].mean(-1)
        reasons += [("most local", -span), ("longest distance", span)]
    if entropy is not None:
        spread = entropy[1].mean(-1)
        reasons += [("most focused", -spread), ("most spread", spread)]
    if not reasons:
        order = -torch.arange(cells.shape[:2].numel()).view(cells.shape[:2])
        reasons = [("first head", order)]
    width = next(f.width(seen.record.end) for f in seen.facts if isinstance(f, Thumbnail))
    chosen: dict[tuple[int, int], str] = {}
    for label, score in reasons:
        for where in score.flatten().argsort(descending=True).tolist():
            head = divmod(where, score.shape[1])
            if head not in chosen:  # six heads, not one head for six reasons
                chosen[head] = label
                break
    return [
        {"layer": layers[a], "head": b, "label": label, "tokens_per_cell": width, "cells": grid}
        for (a, b), label in chosen.items()
        for grid in [cells[a, b].tolist()]
    ]


def _places(seen: Any, row: int) -> Sequence[int]:
    """Positions of the keys of a row that are tokens."""
    record, kept = seen.record, live(seen, "keys")
    if kept is not None:
        positions: list[int] = kept[row].nonzero()[:, 0].tolist()
        return positions
    if record.site.kind == "cross":  # the keys are of another text
        axes = (v.shape[2] for f in seen.facts if f.axis != "cells" for v in seen[f].values())
        return range(next(axes, record.rows))
    return range(record.end)


def _tokens(seen: Any, row: int, given: Sequence[str] | None) -> list[str]:
    """The text of a row in token pieces; numbers for those that are not known."""
    where, count = _places(seen, row), seen.record.end
    if given is not None:
        return [given[n] for n in where] if len(given) == count else list(given)
    ids = seen.input_ids
    unknown = ids is None or seen.record.site.kind == "cross"  # whose keys are of another text
    ids = [] if unknown else ids[min(row, len(ids) - 1)].tolist()
    first = count - len(ids)  # before it lies what a cache held, or what was given as embeddings
    known = [ids[n - first] for n in where if n >= first] if ids and first >= 0 else []
    numbers = [str(n) for n in range(len(where) - len(known))]
    if seen.tokenizer is None:
        return numbers + [f"‹{n}›" for n in known]
    return numbers + pieces(seen.tokenizer, known)


def text_of(seen: Any, row: int) -> tuple[list[str], Sequence[int]]:
    """The tokens of a row of the batch in pieces, and their positions."""
    batch = len(seen.input_ids) if seen.input_ids is not None else 1
    if not 0 <= row < batch:
        raise InputError(f"row {row} is out of range: the batch has {batch}, from 0")
    places = _places(seen, row)
    return _tokens(seen, row, None), places


def _title(tokens: list[str]) -> str:
    words = " ".join("".join(tokens[:24]).split())
    return words[:60] + ("…" if len(words) > 60 else "") or "attention"
