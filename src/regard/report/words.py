"""A report in words: the facts for the headline, what the run cost, and the text itself tinted."""

from __future__ import annotations

import html
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from regard.report.look import LEVELS, finite, level_edges, ordinal, percent, visible

Overview = Mapping[str, Any]
Block = Mapping[str, Any]


def headline(overview: Overview) -> list[tuple[str, str]]:
    """Return up to three facts, each as a short figure and the sentence it begins.

    >>> headline({"sinks": {"rate": 0.77, "epsilon": 0.3, "position": 0}})[0][1]
    'of all heads have an attention sink on the first token: over 30\\xa0% of their attention.'
    """
    tokens = [str(t) for t in overview.get("tokens") or []]
    facts = [
        sink_fact(overview),
        _distance_fact(overview),
        _watched_fact(overview, tokens),
        _spread_fact(overview),
    ]
    return [fact for fact in facts if fact][:3]


def cost_rows(meta: Overview) -> list[tuple[str, str]]:
    """Return what was measured, on what and at what cost, as pairs of name and value."""
    rows: list[tuple[str, str]] = []

    def row(name: str, value: Any) -> None:
        if value not in (None, "", [], {}):
            rows.append((name, str(value)))

    row("Model", meta.get("model"))
    layers, heads, groups = (
        meta.get(key) for key in ("num_layers", "num_heads", "num_key_value_heads")
    )
    if layers and heads:
        shared = f", {groups} key-value heads" if groups and groups != heads else ""
        row("Attention", f"{layers} layers, {heads} heads each{shared}")
    if meta.get("num_tokens"):
        row("Tokens", f"{int(meta['num_tokens']):,}")
    row("Device", ", ".join(str(meta[k]) for k in ("device", "dtype") if meta.get(k)))
    watched, plain = finite(meta.get("seconds")), finite(meta.get("plain_seconds"))
    if watched is not None:
        words = f"{_seconds(watched)} with facts"
        if plain:
            words += f", {_seconds(plain)} without: {watched / plain:.2f} times the plain model"
        row("Time", words)
    peak = finite(meta.get("peak_mib"))
    if peak is not None:
        row("Peak memory", f"{peak:,.0f} MiB")
    row("Facts", ", ".join(str(f) for f in meta.get("facts") or []))
    versions = (meta.get("versions") or {}).items()
    row("Versions", ", ".join(f"{name} {version}" for name, version in versions))
    return rows


def _mean(rows: Any) -> float | None:
    known = [v for row in rows or [] for v in map(finite, row) if v is not None]
    return math.fsum(known) / len(known) if known else None


def _amount(value: float) -> str:
    """Write a number for a headline: whole when large, two digits when small."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def sink_fact(overview: Overview) -> tuple[str, str] | None:
    sinks = overview.get("sinks") or {}
    rate, epsilon = finite(sinks.get("rate")), finite(sinks.get("epsilon"))
    if rate is None:
        return None
    where = ordinal(int(sinks.get("position") or 0))
    limit = f": over {percent(epsilon)} of their attention" if epsilon is not None else ""
    which = "all" if (overview.get("meta") or {}).get("all_heads", True) else "the watched"
    return percent(rate), f"of {which} heads have an attention sink on {where}{limit}."


def _distance_fact(overview: Overview) -> tuple[str, str] | None:
    mean = _mean((overview.get("heads") or {}).get("distance"))
    if mean is None:
        return None
    return f"{_amount(mean)} tokens", "is the mean attention distance over heads and queries."


def _watched_fact(overview: Overview, tokens: Sequence[str]) -> tuple[str, str] | None:
    views = overview.get("views") or {}
    sinks = overview.get("sinks") or {}
    name = "received"
    values = [finite(v) for v in (views.get(name) or {}).get("values") or []]
    sink = int(sinks.get("position") or 0) if sinks else 0
    known = [i for i, v in enumerate(values) if v is not None and i != sink]
    if not known or len(values) != len(tokens):
        return None
    best = max(known, key=lambda i: values[i] or 0)
    ordered = sorted(values[i] or 0 for i in known)
    median = ordered[len(ordered) // 2]
    times = f", {_amount((values[best] or 0) / median)}× the median token" if median > 0 else ""
    word = visible(tokens[best])
    word = word if len(word) <= 24 else word[:23] + "…"
    return (
        f"“{word}”",
        f"at position {best:,} receives the most attention after {ordinal(sink)}{times}.",
    )


def _spread_fact(overview: Overview) -> tuple[str, str] | None:
    mean = _mean((overview.get("heads") or {}).get("entropy"))
    if mean is None:
        return None
    even = _amount(math.exp(min(mean, 50)))
    return f"{mean:.2f} nats", f"is the mean entropy: that of uniform attention over {even} tokens."


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.1f} min"


def tokens_html(
    tokens: Sequence[str],
    view: Block,
    marks: Mapping[str, Sequence[int]] | None = None,
    *,
    limit: int = 4000,
) -> str:
    """Return the text as HTML for notebooks, each token tinted by its value in one view.

    All text is escaped; the tint is translucent, so that it reads on light and on dark. Only the
    first `limit` tokens are written, and the last line says so. Raises ValueError when there is not
    one value a token.

    >>> "&lt;b&gt;" in tokens_html(["<b>", " c"], {"label": "received", "values": [1.0, 2.0]})
    True
    """
    values = [finite(v) for v in view.get("values") or []]
    if len(values) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens but {len(values)} values: give one value a token")
    edges, scale = level_edges(values)
    unit = str(view.get("unit") or "")
    lines = {"preplan": "2px solid #d9730d", "anchor": "2px dotted #00996f"}
    styles: dict[int, str] = {}
    for name, line in lines.items():
        for index in (marks or {}).get(name) or []:
            styles[int(index)] = styles.get(int(index), "") + f";border-bottom:{line}"
    parts = []
    for index, (token, value) in enumerate(zip(tokens[:limit], values[:limit], strict=True)):
        words = f"{index}: {visible(token)} · " + (
            "no value" if value is None else f"{value:.3g} {unit}".strip()
        )
        alpha = 0.0 if value is None else 0.6 * bisect_right(edges, value) / (LEVELS - 1)
        style = (f"background:rgba(46,124,190,{alpha:.2f})" if alpha else "") + styles.get(
            index, ""
        )
        text = html.escape(token).replace("\r\n", "\n").replace("\n", "↵\n")
        attribute = f' style="{style.lstrip(";")}"' if style else ""
        parts.append(f'<span title="{html.escape(words)}"{attribute}>{text}</span>')
    more = "" if len(tokens) <= limit else f"<p>First {limit:,} of {len(tokens):,} tokens.</p>"
    label = html.escape(str(view.get("label") or ""))
    tail = f" ({html.escape(unit)}, {scale} colours)" if unit else f" ({scale} colours)"
    return (
        f'<div class="regard-tokens"><p><b>{label}</b>{tail}</p><div style="white-space:pre-wrap;'
        f'overflow-wrap:anywhere;line-height:1.7">{"".join(parts)}</div>{more}</div>'
    )
