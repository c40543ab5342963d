"""The self-contained HTML page: one file that opens offline and stays small at any length.

The words are plain HTML. The text's values and the figures travel as one compressed block, and so
does plotly.js; the page unpacks both itself, and its content policy forbids any network request.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regard.report import figures
from regard.report.document import Block, Code, Html, Items, Page, Pairs, Plot, Row, Section
from regard.report.look import NBSP, finite, level_edges, ordinal, percent, short, visible
from regard.report.table import Cell, Column, Table, right
from regard.report.words import cost_rows, headline, sink_fact

Overview = Mapping[str, Any]


def write_page(
    overview: Overview,
    path: str | os.PathLike[str],
    render: Callable[[Overview], str] | None = None,
) -> Path:
    """Write the report of an overview to `path` as one HTML file, and return the path.

    `render` makes the page, `render_page` unless another is given.

    The page is written beside its target and then moved there, so that no half page is ever seen.
    Raises OSError, before any work, when the folder is missing or the file cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name a file, such as {target / 'out.html'}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist: create it first")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{target} is write-protected: choose another file")
    if target.exists() and not target.is_file():  # a device or a pipe: nothing to replace
        target.write_text((render or render_page)(overview), encoding="utf-8")
        return target
    place = Path(os.path.realpath(target))  # a link stays, and what it leads to is replaced
    draft = place.with_name(f".{place.name[:60]}.{secrets.token_hex(6)}.tmp")
    try:
        file = draft.open("x", encoding="utf-8", newline="\n")
    except PermissionError as error:
        raise PermissionError(
            f"no permission to write in {place.parent}: choose another folder"
        ) from error
    try:
        with file:
            file.write((render or render_page)(overview))
        os.replace(draft, place)
    finally:
        draft.unlink(missing_ok=True)
    return target


def render_page(overview: Overview) -> str:
    """Return the report as the text of one HTML file; the same overview gives the same text.

    Sections whose block is missing are left out. Raises ValueError when a block contradicts
    itself, such as a view without one value a token.
    """
    meta = overview.get("meta") or {}
    tokens = [str(t) for t in overview.get("tokens") or []]
    sections = [
        _text_section(overview, tokens),
        _sink_section(overview),
        _position_section(overview),
        _heads_section(overview),
        _rhythm_section(overview, tokens),
        _thumbnail_section(overview),
        costs(
            cost_rows(meta),
            "Exact facts of the model’s attention, measured in one forward pass.",
            meta,
        ),
    ]
    under = [str(meta["model"])] if meta.get("model") else []
    number = meta.get("num_tokens") or len(tokens)
    if number:
        under.append(f"{int(number):,} tokens")
    if meta.get("num_layers") and meta.get("num_heads"):
        under.append(f"{meta['num_layers']} layers × {meta['num_heads']} heads")
    return Page(
        str(meta.get("title") or "Attention report"),
        [section for section in sections if section],
        about="attention report",
        under=under,
        facts=headline(overview),
        data={
            "tokens": tokens,
            "views": _views(overview, tokens) if tokens else [],
            "marks": _marks(overview, len(tokens)),
            "rows": overview.get("clicked") or [],
        },
    ).html()


def _views(overview: Overview, tokens: Sequence[str]) -> list[dict[str, Any]]:
    views = []
    for name, view in (overview.get("views") or {}).items():
        raw = list((view or {}).get("values") or [])
        if not raw:
            continue
        if len(raw) != len(tokens):
            raise ValueError(f"the view {name!r} has {len(raw)} values for {len(tokens)} tokens")
        values = [short(v) for v in raw]
        edges, scale = level_edges(values)
        order = sorted(
            (i for i, v in enumerate(values) if v is not None), key=lambda i: (-(values[i] or 0), i)
        )
        views.append(
            {
                "name": str(name),
                "label": str(view.get("label") or name),
                "help": str(view.get("help") or ""),
                "unit": str(view.get("unit") or ""),
                "values": values,
                "edges": [short(edge, 6) for edge in edges],
                "scale": scale,
                "top": order[:12],
            }
        )
    return views


def _marks(overview: Overview, count: int) -> dict[str, list[int]]:
    marks = overview.get("marks") or {}
    return {
        name: [int(i) for i in marks.get(name) or [] if 0 <= int(i) < count]
        for name in ("preplan", "anchor")
        if marks.get(name)
    }


READER = """<div id="reader" hidden><fieldset id="views"><legend>Colour by</legend></fieldset>
<p id="view-help" class="help"></p>
<div class="bar"><div id="scale" aria-hidden="true"></div><div id="mark-switch"></div></div>
<canvas id="strip" height="44" tabindex="0" role="slider" aria-label="Place in the text"
 aria-valuemin="0"></canvas>
<p class="strip-note">The whole text at a glance; the frame is the part shown below.
 Choose a place to go there.</p>
<div id="words" tabindex="0" role="group" aria-label="The text, token by token"
 aria-describedby="view-help"></div>
<div class="pager"><button type="button" id="back">← Previous</button>
<span id="where"></span><button type="button" id="next">Next →</button></div>
<div id="top"></div><p id="spoken" class="unseen" aria-live="polite"></p></div>"""


def _text_section(overview: Overview, tokens: Sequence[str]) -> Section | None:
    if not tokens or not overview.get("views"):
        return None
    clicked = overview.get("clicked")
    return Section(
        "The text, coloured by attention",
        [Html(READER)],
        "The stronger the tint, the higher the value. Point at a token, tap it, or use the arrow "
        "keys to read its values."
        + (" Click a token to colour the text by what it looks at." if clicked else ""),
        "Text",
        "text",
    )


def _sink_section(overview: Overview) -> Section | None:
    sinks = overview.get("sinks")
    if not sinks or not any(sinks.get("alpha") or []):
        return None
    where = ordinal(int(sinks.get("position") or 0))
    fact = sink_fact(overview)
    label = f"Heat map, layer by head: share of attention on {where}."
    label += f" {fact[0]} {fact[1]}" if fact else ""
    blocks: list[Block] = [
        Plot(
            "sinks",
            figures.sink_map(sinks),
            label,
            "How to read this: one cell is one head; the stronger its colour, the larger the "
            f"share of its attention on {where}.",
        )
    ]
    hidden = [h for h in sinks.get("hidden") or [] if h]
    if hidden:
        more = f" (the first 12 of {len(hidden):,})" if len(hidden) > 12 else ""
        columns = [right("Position", "{:,}".format), Column("Token")]
        columns += [right("Heads"), right("Share")]
        rows = [
            (
                int(h.get("position") or 0),
                Cell(visible(str(h.get("token") or "")), "code"),
                h.get("heads"),
                percent(finite(h.get("alpha")) or 0.0),
            )
            for h in hidden[:12]
        ]
        lead = "Later tokens that are attention sinks of some heads."
        blocks.append(Section(f"Later sinks{more}", [Table(columns, rows)], lead))
    return Section(
        "Attention sinks",
        blocks,
        "Softmax weights sum to one, so a head with nothing relevant to read puts its attention "
        f"on some token, often on {where}: an attention sink.",
        "Sinks",
        "sinks",
    )


def _position_section(overview: Overview) -> Section | None:
    block = overview.get("by_position")
    names = ("median", "p90", "mean", "max")
    known = [v for n in names for v in ((block or {}).get(n) or []) if (finite(v) or 0) > 0]
    if not block or not block.get("position") or not known:
        return None
    plot = Plot(
        "position",
        figures.received_by_position(block),
        "Line chart: median, mean, 90th percentile and maximum of the attention received, by "
        "position in the text, on a logarithmic scale.",
        "How to read this: the scale is logarithmic, one grid line is a factor of ten. The band "
        "spans the median to the 90th percentile, the dotted line is the maximum of each bin. The "
        "mean rises at the end because few tokens come after.",
    )
    lead = "Most tokens receive little attention, a few receive a lot."
    return Section("Received attention by position", [plot], lead, "By position", "position")


def _heads_section(overview: Overview) -> Section | None:
    heads = overview.get("heads")
    if not heads:
        return None
    plots = []
    if any(heads.get("entropy") or []):
        plots.append(
            Plot(
                "entropy",
                figures.entropy_map(heads),
                "Heat map, layer by head: mean entropy of attention in nats.",
                "How to read this: a faint head attends to one or two tokens, a strong one to "
                "many.",
            )
        )
    if any(heads.get("distance") or []):
        marked = " Rings mark local heads, dots global ones." if heads.get("local") else ""
        plots.append(
            Plot(
                "distance",
                figures.distance_map(heads),
                "Heat map, layer by head: mean attention distance in tokens.",
                "How to read this: a faint head attends to neighbouring tokens, a strong one "
                f"far back (or to the first token).{marked}",
            )
        )
    if not plots:
        return None
    lead = "Entropy says how spread the attention of a head is, distance how far back it reaches."
    return Section("Entropy and distance per head", [Row(plots, "pair")], lead, "Heads", "heads")


def _rhythm_section(overview: Overview, tokens: Sequence[str]) -> Section | None:
    block = overview.get("rhythm")
    if not block or not block.get("position"):
        return None
    if not any(finite(v) is not None for n in ("waad", "fai") for v in block.get(n) or []):
        return None
    slide = "; drag the strip beneath to move along" if figures.is_long(block) else ""
    plot = Plot(
        "rhythm",
        figures.rhythm(block, tokens=tokens or None, marks=_marks(overview, len(tokens))),
        "Two line charts by position: WAAD, mean attention distance of each token, and FAI, how "
        "much later tokens attend to it, with preplan and anchor tokens marked.",
        "How to read this: a peak on top is a token that attends far back, a peak below a token "
        f"that later tokens attend to{slide}.",
    )
    lead = (
        "Preplan tokens attend far back before a new chunk begins; anchor tokens are attended to "
        "by later tokens."
    )
    return Section("Attention rhythm: WAAD and FAI", [plot], lead, "Rhythm", "rhythm")


def _thumbnail_section(overview: Overview) -> Section | None:
    blocks = [b for b in overview.get("thumbnails") or [] if b and b.get("cells")]
    if not blocks:
        return None
    plots = []
    for index, block in enumerate(blocks):
        name = f"Layer {block.get('layer')}, head {block.get('head')}"
        label = str(block.get("label") or "")
        figure = figures.thumbnail(block, bare=True)
        texts = f"Attention map of {name.lower()}. {label}", f"**{name}** {label}"
        plots.append(Plot(f"thumb{index}", figure, *texts))
    scale = (
        f'<div class="legend"><span>0.01{NBSP}%</span><i class="ramp"></i><span>100{NBSP}% of a '
        "row’s attention (logarithmic)</span></div>"
    )
    return Section(
        "Attention maps of single heads",
        [
            Html(scale),
            Row(plots, "grid"),
            "How to read this: rows are bins of queries, columns bins of keys. A diagonal is a "
            "local head, a strong left edge a sink.",
        ],
        "Attention maps of selected heads, averaged to a small grid.",
        "Maps",
        "maps",
    )


def costs(rows: Iterable[tuple[str, str]], lead: str, meta: Overview) -> Section | None:
    """What was measured, with the notes and the command of `meta`; None when there is nothing."""
    pairs = list(rows)
    if not pairs and not meta.get("command") and not meta.get("notes"):
        return None
    blocks = [Pairs(pairs), *ends(meta.get("notes") or [], meta)]
    return Section("Measurement and cost", blocks, lead, "Cost", "cost")


def ends(notes: Iterable[Any], meta: Overview) -> list[Section]:
    """Notes, and the command that makes the page again."""
    lines = [str(note) for note in notes]
    sections = [Section("Notes", [Items(lines)])] if lines else []
    if meta.get("command"):
        sections.append(Section("Command", [Code(str(meta["command"]))]))
    return sections
