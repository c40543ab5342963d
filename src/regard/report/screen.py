"""The terminal as regard writes to it: what a text would make it do is spelt out, not obeyed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import console
from rich.segment import Segment

from regard.errors import plain


class Console(console.Console):
    """rich's console; texts, transcripts and names reach it without control characters.

    >>> Console(width=40).print("red\\x1b[31m")
    red\\x1b[31m
    """

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            shown = text if control else plain(text)
            yield segment if shown == text else Segment(shown, style)
