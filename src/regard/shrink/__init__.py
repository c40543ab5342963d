"""The same answers from fewer keys and values, in memory or in time."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# name -> module it comes from; nothing is imported before it is asked for
_LAZY = {
    "TaskKV": "task_kv",
    "StreamingLLM": "eviction",
    "SnapKV": "eviction",
    "H2O": "eviction",
    "RandomEviction": "eviction",
    "Recycled": "recycled",
    "VisionDrop": "visiondrop",
}

__all__ = ["H2O", "RandomEviction", "Recycled", "SnapKV", "StreamingLLM", "TaskKV", "VisionDrop"]

if TYPE_CHECKING:
    from .eviction import H2O, RandomEviction, SnapKV, StreamingLLM
    from .recycled import Recycled
    from .task_kv import TaskKV
    from .visiondrop import VisionDrop


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
