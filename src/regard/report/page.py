"""The self-contained HTML page: one file that opens offline and stays small at any length.

The words are plain HTML. The text's values and the figures travel as one compressed block, and so
does plotly.js; the page unpacks both itself, and its content policy forbids any network request.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from regard.report import figures
from regard.report.look import (
    INKS,
    LEVELS,
    NBSP,
    finite,
    level_edges,
    ordinal,
    percent,
    ramp,
    short,
    template,
    visible,
)
from regard.report.words import cost_rows, headline, sink_fact

Overview = Mapping[str, Any]

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)


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
    drawn: dict[str, Any] = {}
    sections = [
        _text_section(overview, tokens),
        _sink_section(overview, drawn),
        _position_section(overview, drawn),
        _heads_section(overview, drawn),
        _rhythm_section(overview, tokens, drawn),
        _thumbnail_section(overview, drawn),
        _costs(
            cost_rows(meta),
            "Exact facts of the model’s own attention, taken during one forward pass.",
            meta,
        ),
    ]
    data = {
        "tokens": tokens,
        "views": _views(overview, tokens) if tokens else [],
        "marks": _marks(overview, len(tokens)),
    }
    title = str(meta.get("title") or "What the model looks at")
    top = _facts(headline(overview))
    return document(title, _header(title, meta, len(tokens)), top, sections, data, drawn)


def document(
    title: str,
    header: str,
    top: str,
    sections: Sequence[Section],
    data: dict[str, Any],
    drawn: dict[str, Any],
) -> str:
    """Return a whole page: `header` and `top` are HTML, `data` is what page.js reads besides the
    figures in `drawn`.
    """
    shown = [section for section in sections if section]
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in shown)
    light, dark = INKS["light"], INKS["dark"]
    data = {
        **data,
        "figures": drawn,
        "themes": {name: template(name) for name in ("light", "dark")},
        "inks": {light[name]: dark[name] for name in light},
    }
    script = _asset("page.js")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="generator" content="regard">',
        f"<title>{escape(title)}</title>",
        f"<style>{_color_variables()}{_asset('style.css')}</style></head><body>",
        '<a class="skip" href="#main">Skip to the report</a>',
        f'<div class="wrap">{header}',
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main id="main">',
        top,
        '<p class="notice" id="notice" role="status" hidden></p>',
        '<noscript><p class="notice">The coloured text and the figures need JavaScript. '
        "The facts in words below do not.</p></noscript>",
        *(
            f'<section id="{key}" aria-labelledby="{key}-title">{body}</section>'
            for key, _, body in shown
        ),
        "</main></div>",
        '<div id="tip" role="tooltip" hidden></div>',
        f'<script type="application/octet-stream" id="data">{_packed_json(data)}</script>',
    ]
    if drawn:
        parts.append(
            f'<script type="application/octet-stream" id="plotly">{_plotly_packed()}</script>'
        )
    parts.append(f"<script>{script}</script></body></html>\n")
    # Half a surrogate pair, as some tokenizers decode it, cannot be written as UTF-8.
    return "\n".join(parts).encode("utf-8", "replace").decode("utf-8")


def _asset(name: str) -> str:
    return files("regard.report").joinpath(name).read_text(encoding="utf-8")


def _pack(text: str) -> str:
    # A fixed time stamp: the same overview must give the same file. Base64 has no "<", so nothing
    # a user wrote can close the script element it travels in.
    packed = gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)
    return base64.b64encode(packed).decode("ascii")


def _packed_json(data: Any) -> str:
    return _pack(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


@lru_cache(maxsize=1)
def _plotly_packed() -> str:
    from plotly.offline import get_plotlyjs

    return _pack(get_plotlyjs())


def _luminance(color: str) -> float:
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (p / 12.92 if p <= 0.04 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _color_variables() -> str:
    """Write the ramp and the inks of both themes as CSS variables; print is always light."""

    def block(theme: str) -> str:
        lines = [f"--{name}:{color};" for name, color in INKS[theme].items()]
        for level, color in enumerate(ramp(theme, LEVELS)):
            # Whichever of black and white stands out more: at least 4.5 to 1 throughout.
            ink = "#000000" if _luminance(color) > 0.179 else "#ffffff"
            lines.append(f"--s{level}:{color};--t{level}:{ink};")
        return ":root{" + "".join(lines) + "}"

    tints = "".join(f".l{i}{{background:var(--s{i});color:var(--t{i})}}" for i in range(1, LEVELS))
    dark = f"@media screen and (prefers-color-scheme:dark){{{block('dark')}}}"
    return block("light") + dark + tints


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


def _header(title: str, meta: Overview, count: int) -> str:
    facts = [str(meta["model"])] if meta.get("model") else []
    number = meta.get("num_tokens") or count
    if number:
        facts.append(f"{int(number):,} tokens")
    if meta.get("num_layers") and meta.get("num_heads"):
        facts.append(f"{meta['num_layers']} layers × {meta['num_heads']} heads")
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        '<header><p class="brand">regard <span>attention report</span></p>'
        f'<h1>{escape(title)}</h1><ul class="under">{items}</ul></header>'
    )


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    """The cards on top: each a short figure and the sentence it begins."""
    cards = "".join(
        f"<li><strong>{escape(big)}</strong><span>{escape(words)}</span></li>"
        for big, words in facts
    )
    return f'<ul class="facts" aria-label="In short">{cards}</ul>' if cards else ""


Section = tuple[str, str, str] | None


def _heading(key: str, title: str, lead: str) -> str:
    return f'<h2 id="{key}-title">{title}</h2><p class="lead">{lead}</p>'


def _slot(drawn: dict[str, Any], key: str, figure: Any, label: str, caption: str) -> str:
    """Store a figure for the packed block and return the place the page draws it in."""
    shape = json.loads(figure.to_json())
    drawn[key] = {"data": shape["data"], "layout": shape["layout"]}
    drawn[key]["layout"].pop("template", None)
    height = shape["layout"].get("height")
    size = f' style="min-height:{int(height)}px"' if height else ""
    return (
        f'<figure><div class="plot" data-figure="{key}" role="img" '
        f'aria-label="{escape(label)}"{size}></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _text_section(overview: Overview, tokens: Sequence[str]) -> Section:
    if not tokens or not overview.get("views"):
        return None
    body = (
        _heading(
            "text",
            "The text, coloured by attention",
            "The stronger the tint, the higher the value of that token. "
            "Point at a token, tap it, or walk with the arrow keys to read its numbers.",
        )
        + '<div id="reader" hidden><fieldset id="views"><legend>Colour by</legend></fieldset>'
        '<p id="view-help" class="help"></p>'
        '<div class="bar"><div id="scale" aria-hidden="true"></div>'
        '<div id="mark-switch"></div></div>'
        '<canvas id="strip" height="44" tabindex="0" role="slider" aria-label="Place in the text" '
        'aria-valuemin="0"></canvas>'
        '<p class="strip-note">The whole text at a glance; the frame is the part shown below. '
        "Choose a place to go there.</p>"
        '<div id="words" tabindex="0" role="group" aria-label="The text, token by token" '
        'aria-describedby="view-help"></div>'
        '<div class="pager"><button type="button" id="back">← Previous</button>'
        '<span id="where"></span><button type="button" id="next">Next →</button></div>'
        '<div id="top"></div><p id="spoken" class="unseen" aria-live="polite"></p></div>'
    )
    return "text", "Text", body


def _sink_section(overview: Overview, drawn: dict[str, Any]) -> Section:
    sinks = overview.get("sinks")
    if not sinks or not any(sinks.get("alpha") or []):
        return None
    where = ordinal(int(sinks.get("position") or 0))
    fact = sink_fact(overview)
    label = f"Heat map, layer by head: share of attention on {where}."
    label += f" {fact[0]} {fact[1]}" if fact else ""
    body = _heading(
        "sinks",
        "Where attention is parked",
        f"Heads with nothing to say still have to put their attention somewhere, and many leave it "
        f"on {where}: an attention sink.",
    ) + _slot(
        drawn,
        "sinks",
        figures.sink_map(sinks),
        label,
        f"How to read this: one cell is one head; the stronger its colour, the more of its "
        f"attention rests on {where}.",
    )
    hidden = [h for h in sinks.get("hidden") or [] if h]
    if hidden:
        rows = "".join(
            f"<tr><td>{int(h.get('position') or 0):,}</td>"
            f"<td><code>{escape(visible(str(h.get('token') or '')))}</code></td>"
            f"<td>{escape(str(h.get('heads') if h.get('heads') is not None else '–'))}</td>"
            f"<td>{percent(finite(h.get('alpha')) or 0.0)}</td></tr>"
            for h in hidden[:12]
        )
        more = f" (the first 12 of {len(hidden):,})" if len(hidden) > 12 else ""
        body += (
            f"<h3>Sinks further on{more}</h3><p class='help'>Later tokens that some heads also "
            "park their attention on.</p><div class='scroll' tabindex='0' role='region' "
            "aria-label='Sinks further on'><table><thead><tr><th scope='col'>Position</th>"
            "<th scope='col'>Token</th><th scope='col'>Heads</th>"
            f"<th scope='col'>Share</th></tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return "sinks", "Sinks", body


def _position_section(overview: Overview, drawn: dict[str, Any]) -> Section:
    block = overview.get("by_position")
    names = ("median", "p90", "mean", "max")
    known = [v for n in names for v in ((block or {}).get(n) or []) if (finite(v) or 0) > 0]
    if not block or not block.get("position") or not known:
        return None
    body = _heading(
        "position",
        "Who is watched, by place",
        "Attention is not shared out evenly: most tokens get a little, a few get a great deal.",
    ) + _slot(
        drawn,
        "position",
        figures.received_by_position(block),
        "Line chart: median, mean, 90th percentile and maximum of the attention received, by "
        "position in the text, on a logarithmic scale.",
        "How to read this: each line step upwards is ten times more attention; the band holds the "
        "upper-middle tokens, the dotted line the most watched of each stretch. The last tokens "
        "rise because few tokens come after them to look elsewhere.",
    )
    return "position", "By position", body


def _heads_section(overview: Overview, drawn: dict[str, Any]) -> Section:
    heads = overview.get("heads")
    if not heads:
        return None
    slots = ""
    if any(heads.get("entropy") or []):
        slots += _slot(
            drawn,
            "entropy",
            figures.entropy_map(heads),
            "Heat map, layer by head: mean entropy of attention in nats.",
            "How to read this: a faint head stares at one or two tokens, a strong one "
            "takes in many at once.",
        )
    if any(heads.get("distance") or []):
        marked = " Rings mark local heads, dots global ones." if heads.get("local") else ""
        slots += _slot(
            drawn,
            "distance",
            figures.distance_map(heads),
            "Heat map, layer by head: mean look-back distance in tokens.",
            "How to read this: a faint head reads its neighbours, a strong one reaches far back "
            f"(or to the first token).{marked}",
        )
    if not slots:
        return None
    lead = "Some heads point at one word, others take in a page; some read next door, others far."
    body = _heading("heads", "How each head looks", lead) + f'<div class="pair">{slots}</div>'
    return "heads", "Heads", body


def _rhythm_section(overview: Overview, tokens: Sequence[str], drawn: dict[str, Any]) -> Section:
    block = overview.get("rhythm")
    if not block or not block.get("position"):
        return None
    if not any(finite(v) is not None for n in ("waad", "fai") for v in block.get(n) or []):
        return None
    slide = "; drag the strip beneath to move along" if figures.is_long(block) else ""
    figure = figures.rhythm(block, tokens=tokens or None, marks=_marks(overview, len(tokens)))
    body = _heading(
        "rhythm",
        "The rhythm of looking back",
        "Text comes in beats: the model reaches back before it starts a new piece (preplan), then "
        "writes a token that later ones keep coming back to (anchor).",
    ) + _slot(
        drawn,
        "rhythm",
        figure,
        "Two line charts by position: WAAD, how far back each token looks, and FAI, how much "
        "later tokens attend to it, with preplan and anchor tokens marked.",
        "How to read this: a high point on top is a token that looks far back, a high point below "
        f"one that is looked at again{slide}.",
    )
    return "rhythm", "Rhythm", body


def _thumbnail_section(overview: Overview, drawn: dict[str, Any]) -> Section:
    blocks = [b for b in overview.get("thumbnails") or [] if b and b.get("cells")]
    if not blocks:
        return None
    cells = []
    for index, block in enumerate(blocks):
        key = f"thumb{index}"
        name = f"Layer {block.get('layer')}, head {block.get('head')}"
        label = str(block.get("label") or "")
        slot = _slot(
            drawn,
            key,
            figures.thumbnail(block, bare=True),
            f"Attention map of {name.lower()}. {label}",
            f"<b>{escape(name)}</b> {escape(label)}",
        )
        cells.append(slot)
    lead = (
        "Whole attention maps of chosen heads, averaged down to a small grid, so that any length "
        "fits on the screen."
    )
    low, high = f"0.01{NBSP}%", f"100{NBSP}%"
    body = (
        _heading("maps", "Maps of single heads", lead)
        + f'<div class="legend"><span>{low}</span><i class="ramp"></i><span>{high} of a row’s '
        f'attention (logarithmic)</span></div><div class="grid">'
        f'{"".join(cells)}</div><p class="help">How to read this: each row is a stretch of reading '
        "tokens, each column the tokens they read; a diagonal is a head that reads its neighbours, "
        "a strong left edge one that rests on the beginning.</p>"
    )
    return "maps", "Maps", body


def _costs(rows: Iterable[tuple[str, str]], lead: str, meta: Overview) -> Section:
    """What was measured, with the notes and the command of `meta`; None when there is nothing."""
    cells = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in rows)
    if not cells and not meta.get("command") and not meta.get("notes"):
        return None
    body = _heading("cost", "What was measured, on what, at what cost", lead)
    body += f"<dl>{cells}</dl>{_notes(meta.get('notes') or [])}{_again(meta)}"
    return "cost", "Cost", body


def _again(meta: Overview) -> str:
    if not meta.get("command"):
        return ""
    command = escape(str(meta["command"]))
    return f"<h3>To make this page again</h3><pre tabindex='0'><code>{command}</code></pre>"


def _notes(notes: Iterable[Any]) -> str:
    items = "".join(f"<li>{escape(str(note))}</li>" for note in notes)
    return f"<h3>Notes</h3><ul class='notes'>{items}</ul>" if items else ""
