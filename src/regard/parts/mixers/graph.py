"""Adjacency: how attention weights become the edges of a graph."""

from __future__ import annotations

from typing import Any

ADJACENCIES = ("none",)


def mixers() -> dict[str, Any]:
    """The modules of the graph mixers."""
    return {}
