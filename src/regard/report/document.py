"""One page of sections and blocks: as an HTML file that opens offline, as Markdown, on a terminal.

A block is a paragraph (`str`), a `Table`, a `Chart`, or one of the classes here. Words may hold
`code`, *emphasis* and **strong** words; all else in them is shown as it is.

The HTML is one file: figures of plotly travel with plotly.js as compressed blocks that the page
unpacks itself, and its content policy forbids any network request. Without such figures there is no
script at all.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from regard.report.look import INKS, LEVELS, ramp, template
from regard.report.table import Cell, Table, clean, markdown, wrap

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Block = Any  # str, Table, Chart, or a class of this module

QUIET = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
SCRIPTED = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Items:
    """A list with bullets."""

    lines: Sequence[str]

    def html(self) -> str:
        items = "".join(f"<li>{inline(line)}</li>" for line in self.lines)
        return f"<ul class='notes'>{items}</ul>" if items else ""

    def markdown(self) -> str:
        return "\n".join(f"- {markdown(line)}" for line in self.lines)


@dataclass(frozen=True)
class Code:
    """A command or a listing, as typed."""

    text: str

    def html(self) -> str:
        return f"<pre tabindex='0'><code>{escape(self.text)}</code></pre>"

    def markdown(self) -> str:
        return f"```\n{self.text}\n```"


@dataclass(frozen=True)
class Pairs:
    """Names with what each stands for."""

    rows: Sequence[tuple[str, str]]

    def html(self) -> str:
        rows = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in self.rows)
        return f"<dl>{rows}</dl>"

    def markdown(self) -> str:
        return Items([f"{name}: {words}" for name, words in self.rows]).markdown()


@dataclass(frozen=True)
class Picture:
    """A PIL image with its caption; it travels inside the page, `width` pixels wide."""

    image: Any
    caption: str
    width: int | None = None

    def html(self) -> str:
        data = base64.b64encode(png(self.image)).decode()
        wide = f' style="width:{self.width}px"' if self.width else ""
        return (
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(self.caption)}"{wide}>'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )


@dataclass(frozen=True)
class Plot:
    """A figure of plotly, drawn by the page when it comes into view.

    Attributes:
        key: its name in the page.
        label: what it shows, for those who cannot see it.
        caption: how to read it.
    """

    key: str
    figure: Any
    label: str
    caption: str

    def html(self) -> str:
        height = self.figure.layout.height
        size = f' style="min-height:{int(height)}px"' if height else ""
        return (
            f'<figure><div class="plot" data-figure="{self.key}" role="img" '
            f'aria-label="{escape(self.label)}"{size}></div>'
            f"<figcaption>{inline(self.caption)}</figcaption></figure>"
        )

    def drawn(self) -> dict[str, Any]:
        """What page.js draws."""
        shape = json.loads(self.figure.to_json())
        shape["layout"].pop("template", None)
        return {"data": shape["data"], "layout": shape["layout"]}


@dataclass(frozen=True)
class Html:
    """HTML for the page alone; whoever makes it escapes what others wrote."""

    text: str

    def html(self) -> str:
        return self.text


@dataclass(frozen=True)
class Row:
    """Blocks side by side: pictures in a "row", figures as a "pair" or in a "grid"."""

    blocks: Sequence[Block]
    kind: str = "row"

    def html(self) -> str:
        return f'<div class="{self.kind}">{"".join(map(_html, self.blocks))}</div>'


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; those in a section are a level lower.

    Attributes:
        lead: what the reader sees there, in a sentence.
        name: its link on top of the page; none if empty.
        key: its anchor; of the title if empty.
    """

    title: str
    blocks: Sequence[Block]
    lead: str = ""
    name: str = ""
    key: str = ""

    @property
    def anchor(self) -> str:
        return self.key or re.sub(r"\W+", "-", self.title.lower()).strip("-")

    def html(self, level: int = 2) -> str:
        lead = f'<p class="lead">{inline(self.lead)}</p>' if self.lead else ""
        heading = f'<h{level} id="{self.anchor}-title">{escape(self.title)}</h{level}>{lead}'
        body = "".join(
            b.html(level + 1) if isinstance(b, Section) else _html(b) for b in self.blocks
        )
        if level > 2:
            return heading + body
        return (
            f'<section id="{self.anchor}" aria-labelledby="{self.anchor}-title">'
            f"{heading}{body}</section>"
        )

    def markdown(self, level: int = 2) -> str:
        return _joined(
            f"{'#' * level} {markdown(self.title)}",
            markdown(self.lead),
            *(
                b.markdown(level + 1) if isinstance(b, Section) else _markdown(b)
                for b in self.blocks
            ),
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        blocks = [*([self.lead] if self.lead else []), *self.blocks]
        parts = [part for block in blocks if (part := list(_shown(block, options.max_width)))]
        if not parts:
            return
        yield Text()
        yield from _lines(self.title, options.max_width, "bold")
        for n, part in enumerate(parts):
            if n and not isinstance(part[0], Section):
                yield Text()
            yield from part


@dataclass(frozen=True)
class Page:
    """A title, what stands before the sections, and the sections.

    Attributes:
        intro: blocks before the first section.
        about: the kind of page, beside the name of the package.
        under: short facts under the title.
        facts: cards on top, each a short figure and the sentence it begins.
        source: for a comment in Markdown: what it is generated from.
        data: what page.js reads besides the figures.

    >>> page = Page("Kernels", [Section("Times", [Table(["a"], [["1"]])])], intro=["One run."])
    >>> print(page.markdown(), end="")
    # Kernels
    <BLANKLINE>
    One run.
    <BLANKLINE>
    ## Times
    <BLANKLINE>
    | a |
    | --- |
    | 1 |
    """

    title: str
    sections: Sequence[Section]
    intro: Sequence[Block] = ()
    about: str = "measured"
    under: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    source: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """The page as Markdown; the same page gives the same text."""
        comment = f"<!-- Generated from {self.source}; do not edit. -->" if self.source else ""
        parts = [*map(_markdown, self.intro), *(s.markdown() for s in self.sections)]
        return _joined(f"# {markdown(self.title)}", comment, *parts) + "\n"

    def html(self) -> str:
        """The page as one HTML file; the same page gives the same text."""
        drawn = {plot.key: plot.drawn() for plot in _plots(self.sections)}
        script = bool(drawn or self.data)
        links = "".join(
            f'<li><a href="#{s.anchor}">{escape(s.name)}</a></li>' for s in self.sections if s.name
        )
        nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if links else ""
        items = "".join(f"<li>{escape(fact)}</li>" for fact in self.under)
        cards = "".join(
            f"<li><strong>{escape(big)}</strong><span>{escape(words)}</span></li>"
            for big, words in self.facts
        )
        parts = [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" '
            f'content="{SCRIPTED if script else QUIET}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta name="generator" content="regard">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{_color_variables()}{_asset('style.css')}</style></head><body>",
            '<a class="skip" href="#main">Skip to the report</a>',
            f'<div class="wrap"><header><p class="brand">regard <span>{escape(self.about)}</span>'
            f"</p><h1>{escape(self.title)}</h1>",
            f'<ul class="under">{items}</ul>' if items else "",
            f'</header>{nav}<main id="main">',
            f'<ul class="facts" aria-label="In short">{cards}</ul>' if cards else "",
            *([_SCRIPT_NOTES] if script else []),
            *map(_html, self.intro),
            *(section.html() for section in self.sections),
            "</main></div>",
        ]
        if script:
            parts += _scripts(self.data, drawn)
        # Half a surrogate pair, as some tokenizers decode it, cannot be written as UTF-8.
        text = "\n".join([*parts, "</body></html>\n"])
        return text.encode("utf-8", "replace").decode("utf-8")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _lines(self.title, options.max_width, "bold")
        for block in (*self.intro, *self.sections):
            yield from _shown(block, options.max_width)


_SCRIPT_NOTES = (
    '<p class="notice" id="notice" role="status" hidden></p>'
    '<noscript><p class="notice">The coloured text and the figures need JavaScript. '
    "The facts in words below do not.</p></noscript>"
)


def png(image: Any) -> bytes:
    """A PIL image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def inline(text: str) -> str:
    """Words as HTML.

    >>> inline("`a < b` is *not* **this**")
    '<code>a &lt; b</code> is <em>not</em> <strong>this</strong>'
    """

    def marked(match: re.Match[str]) -> str:
        tag = {"`": "code", "**": "strong", "*": "em"}[match[1]]
        return f"<{tag}>{match[2]}</{tag}>"

    return re.sub(r"(`|\*\*|\*)(?=\S)(.+?)(?<=\S)\1", marked, escape(text))


def _html(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{inline(block)}</p>"
    return str(block.html())


def _markdown(block: Block) -> str:
    if isinstance(block, str):
        return markdown(block)
    return str(block.markdown()) if hasattr(block, "markdown") else ""


def _joined(*parts: str) -> str:
    return "\n\n".join(part.rstrip("\n") for part in parts if part)


def show(*blocks: Block, console: Console | None = None) -> None:
    """Print blocks on a terminal, with a blank line between them; a `Cell` is a styled line."""
    if console is None:
        from regard.report.screen import Console

        console = Console()
    parts = [part for block in blocks if (part := list(_shown(block, console.width)))]
    for n, part in enumerate(parts):
        if n:
            console.print()
        console.print(*part, sep="\n")


def _shown(block: Block, width: int) -> Iterator[Any]:
    """A block on a terminal; what only a page can show is left out."""
    if isinstance(block, (Table, Section)):
        yield block
    elif isinstance(block, str):
        yield from _lines(block, width)
    elif isinstance(block, Cell):
        yield from _lines(block.text, width, block.style)
    elif isinstance(block, Items):
        for line in block.lines:
            yield from _lines(line, width, bullet="- ")
    elif isinstance(block, Pairs):
        yield Table(["", ""], block.rows)
    elif isinstance(block, Code):
        yield from _lines(block.text, width)


def _lines(text: str, width: int, style: str = "", bullet: str = "") -> Iterator[Any]:
    from rich.text import Text

    for n, line in enumerate(wrap(clean(text), width - len(bullet))):
        lead = " " * len(bullet) if n else bullet
        yield Text(lead + line, style=style, no_wrap=True)


def _plots(blocks: Iterable[Block]) -> Iterator[Plot]:
    for block in blocks:
        if isinstance(block, Plot):
            yield block
        elif isinstance(block, (Section, Row)):
            yield from _plots(block.blocks)


# -- the file --------------------------------------------------------------------------------------
def _scripts(data: Mapping[str, Any], drawn: dict[str, Any]) -> list[str]:
    """What page.js unpacks, and page.js itself."""
    light, dark = INKS["light"], INKS["dark"]
    packed = {
        **{"tokens": [], "views": [], "marks": {}, **data, "figures": drawn},
        "themes": {name: template(name) for name in ("light", "dark")},
        "inks": {light[name]: dark[name] for name in light},
    }
    text = json.dumps(packed, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = [
        '<div id="tip" role="tooltip" hidden></div>',
        f'<script type="application/octet-stream" id="data">{_pack(text)}</script>',
    ]
    if drawn:
        plotly = _plotly_packed()
        parts.append(f'<script type="application/octet-stream" id="plotly">{plotly}</script>')
    return [*parts, f"<script>{_asset('page.js')}</script>"]


def _asset(name: str) -> str:
    return files("regard.report").joinpath(name).read_text(encoding="utf-8")


def _pack(text: str) -> str:
    # A fixed time stamp: the same overview must give the same file. Base64 has no "<", so nothing
    # a user wrote can close the script element it travels in.
    packed = gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)
    return base64.b64encode(packed).decode("ascii")


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
