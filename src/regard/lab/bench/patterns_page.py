"""Every named mask, drawn: on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import torch

from regard.report.document import Html, Page, Row

from .cases import Case, masks

SIZE = 32  # tokens of a drawing: small enough to see single pairs


def cases(names: str = "all", size: int = SIZE, seed: int = 42) -> list[Case]:
    """The masks by name at the size of a drawing; documents are cut short, so that several show."""
    drawn_cases = [Case(name, size, seed=seed) for name in masks(names)]
    for case in drawn_cases:
        known = case.parameters
        if "lengths" in known:
            known["lengths"] = _short(size)
            if case.pattern == "prefix_lm_document" and "prefix" not in known:
                known["prefix"] = max(1, size // 8)
        if "block" in known and "=" not in case.name:
            known["block"] = max(2, size // 8)
        if case.pattern == "block_causal_document":
            known["lengths"] = _whole(size, known["block"])
    return drawn_cases


def _short(size: int) -> list[int]:
    parts = [max(1, round(size * share)) for share in (0.3, 0.15, 0.35)]
    rest = size - sum(parts)
    return [*parts, rest] if rest > 0 else [size]


def _whole(size: int, block: int) -> list[int]:
    parts = [2 * block, block, 3 * block]
    rest = size - sum(parts)
    return [*parts, rest] if rest > 0 else [size]


def drawing(case: Case) -> str:
    """The mask in text, two queries a line: █ both, ▀ upper, ▄ lower.

    >>> print(drawing(Case("causal", 4)))
    █▄
    ███▄
    """
    cells = case.mask.cells(case.total, case.total)[0, 0]
    if len(cells) % 2:
        cells = torch.cat([cells, torch.zeros_like(cells[:1])])
    signs = {(True, True): "█", (True, False): "▀", (False, True): "▄", (False, False): " "}
    return "\n".join(
        "".join(signs[a, b] for a, b in zip(upper, lower)).rstrip()
        for upper, lower in cells.unflatten(0, (-1, 2)).tolist()
    )


def words(case: Case) -> str:
    """The parameters of a mask in words."""
    return ", ".join(f"{n} {v}" for n, v in case.parameters.items() if n != "seed")


def table(cases: Sequence[Case]) -> Any:
    """All masks for a terminal."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    shown = []
    for case in cases:
        body = Text.assemble(
            (drawing(case), "cyan"),
            f"\n{_pattern(case).definition}\n",
            (words(case), "dim"),
        )
        share = f"{case.area / case.total**2:.0%} of pairs"
        shown.append(Panel(body, title=Text(case.name), subtitle=share, width=case.total + 6))
    return Columns(shown)


def html(cases: Sequence[Case]) -> str:
    """All masks as one page that opens offline."""
    cards = []
    for case in cases:
        p = _pattern(case)
        cards.append(
            Html(
                f"<div><h2>{escape(case.name)}</h2>{svg(case)}<p>{escape(p.definition)}</p>"
                f"<p>{escape(p.kind)}; {case.area} of {case.total**2} pairs "
                f"({case.area / case.total**2:.0%}); {escape(words(case) or 'no parameter')}</p>"
                "</div>"
            )
        )
    legend = "Rows are queries, columns are keys; a filled square is a pair that attends."
    return Page("Attention masks", [], [legend, Row(cards, "cards")], about="masks").html()


def svg(case: Case) -> str:
    """The mask as an image, one bar for every run of keys that a query sees."""
    n = case.total
    bars = []
    cells = case.mask.cells(n, n)[0, 0].int()
    edges = torch.diff(cells, dim=1, prepend=cells.new_zeros(n, 1), append=cells.new_zeros(n, 1))
    for q in range(n):
        starts, stops = ((edges[q] == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
        bars += [f"M{a} {q}h{b - a}v1h-{b - a}z" for a, b in zip(starts, stops)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {n} {n}" role="img" '
        f'shape-rendering="crispEdges"><title>{escape(case.name)}</title>'
        f'<rect width="{n}" height="{n}" fill="var(--s0)"/><path d="{"".join(bars)}" '
        'fill="var(--line)"/>'
        "</svg>"
    )


def _pattern(case: Case) -> Any:
    from regard.core.patterns import PATTERNS

    return PATTERNS[case.pattern]
