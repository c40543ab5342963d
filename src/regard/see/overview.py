"""The overview: what a `Watch` has seen, as one plain dictionary for pages, notebooks, terminals
and JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.core import Influence, Thumbnail, WindowedDistance
from regard.versions import versions

from .preplan_anchor import Heads, head_split, peaks
from .sink_emergence import EPSILON, hidden_sinks, sink_rate

BINS = 512
TAIL = 16  # the last tokens are seen by few queries, so what they receive on average says little
_HELP = {
    "received": (
        "attention received",
        "share of later tokens' attention that lands here, mean over layers and heads",
        "share",
    ),
    "entropy": (
        "entropy",
        "how spread this token's own look is, mean over layers and heads",
        "nats",
    ),
    "distance": ("look-back distance", "how far back this token looks on average", "tokens"),
    "waad": (
        "windowed distance (WAAD)",
        "mean look-back of the local heads, clipped to the window: peaks open a new chunk",
        "tokens",
    ),
    "fai": (
        "future influence (FAI)",
        "mean attention of the global heads from tokens further on: peaks are anchors",
        "share",
    ),
}


def stack(seen: Any, name: str, row: int = 0) -> tuple[list[int], Tensor] | None:
    """One fact of one batch row over the layers of the main part: (layers, `[layers, heads,
    ...]`), None if not watched.
    """
    if name not in seen:
        return None
    layers = seen[name]
    if not len(layers) or len({layers[n].shape for n in layers}) > 1:
        return None
    return list(layers), torch.stack([layers[n][row].float() for n in layers]).cpu()


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
        for layer, value in seen[fact].items():
            rows.setdefault(layer, {"layer": layer})[fact.name] = float(value.float().mean())
    return Table(rows[n] for n in sorted(rows))


def overview(
    seen: Any,
    *,
    tokens: Sequence[str] | None = None,
    row: int = 0,
    title: str | None = None,
    model_name: str | None = None,
    **meta: Any,
) -> dict[str, Any]:
    """Everything the report shows, from the facts that were watched; what was not is left out.

    Args:
        seen: a `Watch` that has seen a forward or a generation.
        tokens: the pieces of the text; decoded with the tokenizer that `regard.load` brought when
            None.
        row: which row of the batch.
        meta: further entries of the "meta" block (seconds, plain_seconds, peak_mib, notes,
            command).
    """
    text = seen.model.config.get_text_config()
    heads = next((v.shape[1] for f in seen.facts if f.name != "top" for v in seen[f].values()), 0)
    tokens = list(tokens) if tokens is not None else _pieces(seen, row)
    page: dict[str, Any] = {
        "meta": {
            "title": title or _title(tokens),
            "model": model_name or seen.model.config._name_or_path or type(seen.model).__name__,
            "num_layers": len(seen[seen.facts[0]]),
            "num_heads": heads,
            "num_key_value_heads": getattr(text, "num_key_value_heads", heads) or heads,
            "num_tokens": len(tokens),
            "device": str(seen.model.device),
            "dtype": str(seen.model.dtype).removeprefix("torch."),
            "seconds": seen.seconds,
            "plain_seconds": None,
            "peak_mib": None,
            "facts": [f.name for f in seen.facts],
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
        page["views"]["received"] = _view("received", alpha[1].mean((0, 1)))
        if len(tokens) > 2 * TAIL:
            page["views"]["received"]["values"][-TAIL:] = [None] * TAIL
        page["sinks"] = _sinks(*alpha, tokens)
        page["by_position"] = _by_position(alpha[1])
    entropy, distance = stack(seen, "entropy", row), stack(seen, "distance", row)
    for name, found in (("entropy", entropy), ("distance", distance)):
        if found is not None:
            page["views"][name] = _view(name, found[1].mean((0, 1)))
    if entropy is not None or distance is not None:
        page["heads"] = _heads(entropy, distance)
    _add_rhythm(page, seen, distance, row)
    shown = stack(seen, "thumbnail", row)
    if shown is not None:
        page["thumbnails"] = _thumbnails(seen, shown, alpha, entropy, distance, len(tokens))
    return page


def _view(name: str, values: Tensor) -> dict[str, Any]:
    label, text, unit = _HELP[name]
    return {
        "label": label,
        "help": text,
        "unit": unit,
        "values": [round(v, 6) for v in values.tolist()],
    }


def _sinks(
    layers: list[int], alpha: Tensor, tokens: list[str], position: int = 0
) -> dict[str, Any]:
    """Sink map of the first position, and the later tokens that are sinks of some heads."""
    batch = alpha[None]
    found = hidden_sinks(batch, after=position, tail=TAIL)[:12]
    hidden = [
        {**{n: f[n] for n in ("position", "heads", "alpha")}, "token": tokens[f["position"]]}
        for f in found
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
    """Mean received attention against position; over the heads of all layers, averaged within
    bins.
    """
    flat = alpha.flatten(0, 1)
    tokens = flat.shape[1]
    edges = torch.unique(
        torch.cat(
            [
                torch.arange(min(64, tokens)),
                torch.logspace(0, 1, BINS, base=max(tokens, 2)).long() - 1,
            ]
        )
    ).clamp_max(tokens - 1)
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
        one = distance[1].shape[:2].numel() < 2
        split = Heads((), ()) if one else head_split(distance[1].mean(-1), distance[0])
        block["local"] = [list(pair) for pair in split.local]
        block["global"] = [list(pair) for pair in split.far]
    return block


def _add_rhythm(page: dict[str, Any], seen: Any, distance: Any, row: int) -> None:
    """WAAD of the local and FAI of the global heads, with their peaks (Li et al., 2025)."""
    waad, fai = stack(seen, "waad", row), stack(seen, "influence", row)
    if (
        distance is None
        or distance[1].shape[:2].numel() < 2
        or waad is None
        or fai is None
        or waad[1].shape[-1] < 8
        or not seen.causal
    ):
        return
    rows = list(range(len(distance[0])))
    split = head_split(distance[1].mean(-1), rows)
    window = next(f.window for f in seen.facts if isinstance(f, WindowedDistance))
    band = next(f.band for f in seen.facts if isinstance(f, Influence)) or (0, 0)
    back = torch.stack([waad[1][pair] for pair in split.local]).mean(0)
    ahead = torch.stack([fai[1][pair] for pair in split.far]).mean(0)
    known = max(0, len(ahead) - band[0])  # the last tokens have no token that far ahead
    page["views"]["waad"] = _view("waad", back)
    page["views"]["fai"] = _view("fai", ahead)
    page["views"]["fai"]["values"][known:] = [None] * (len(ahead) - known)
    page["marks"] = {
        "preplan": peaks(back),
        "anchor": peaks(ahead[:known]),
    }
    page["rhythm"] = {
        "position": list(range(len(back))),
        "waad": page["views"]["waad"]["values"],
        "fai": page["views"]["fai"]["values"],
        "window": window,
        "horizon": list(band),
    }


def _thumbnails(
    seen: Any, shown: Any, alpha: Any, entropy: Any, distance: Any, tokens: int
) -> list[dict[str, Any]]:
    """A handful of heads worth a look, each chosen for a reason."""
    layers, cells = shown
    reasons: list[tuple[str, Tensor]] = []
    if alpha is not None:
        reasons.append(("strongest sink", alpha[1][:, :, 0]))
        reasons.append(("weakest sink", -alpha[1][:, :, 0]))
    if distance is not None:
        reasons.append(("most local", -distance[1].mean(-1)))
        reasons.append(("longest look-back", distance[1].mean(-1)))
    if entropy is not None:
        reasons.append(("most focused", -entropy[1].mean(-1)))
        reasons.append(("most spread", entropy[1].mean(-1)))
    if not reasons:
        reasons = [
            (
                "first head",
                -torch.arange(cells.shape[0] * cells.shape[1]).view(cells.shape[:2]).float(),
            )
        ]
    width = next(f.width(tokens) for f in seen.facts if isinstance(f, Thumbnail))
    chosen: dict[tuple[int, int], str] = {}
    for label, score in reasons:
        for where in score.flatten().argsort(descending=True).tolist():
            head = divmod(where, score.shape[1])
            if head not in chosen:  # six heads, not one head for six reasons
                chosen[head] = label
                break
    return [
        {
            "layer": layers[a],
            "head": b,
            "label": label,
            "tokens_per_cell": width,
            "cells": cells[a, b].tolist(),
        }
        for (a, b), label in chosen.items()
    ]


def _pieces(seen: Any, row: int) -> list[str]:
    """The text in token pieces; numbers where no tokenizer is known."""
    if seen.input_ids is None:
        fact = next(f for f in seen.facts if f.axis in ("queries", "keys"))
        return [str(n) for n in range(next(iter(seen[fact].values())).shape[2])]
    ids = seen.input_ids[min(row, len(seen.input_ids) - 1)].tolist()
    tokenizer = seen.tokenizer
    if tokenizer is None:
        return [f"‹{n}›" for n in ids]
    return [tokenizer.decode([n]) for n in ids]


def _title(tokens: list[str]) -> str:
    words = " ".join("".join(tokens[:24]).split())
    return words[:60] + ("…" if len(words) > 60 else "") or "attention"
