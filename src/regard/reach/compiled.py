"""Compiled models: while a session watches one, it runs as written, for a graph that was compiled
before knows nothing of the session.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_lock = threading.Lock()
_open = 0
_stance: Any = None


def is_compiled(model: Any) -> bool:
    """Whether a model or a part of it runs through `torch.compile`."""
    return any(
        type(m).__name__ == "OptimizedModule"
        or getattr(m, "_compiled_call_impl", None) is not None
        or hasattr(vars(m).get("forward"), "_torchdynamo_orig_callable")
        for m in model.modules()
    )


def eagerly() -> Callable[[], None]:
    """Leave compiled graphs alone until the result is called."""
    _count(1)
    return lambda: _count(-1)


def _count(more: int) -> None:
    global _open, _stance
    with _lock:
        before, _open = _open, _open + more
        if not before:
            _stance = torch.compiler.set_stance("force_eager")
        elif not _open:
            _stance.__exit__(None, None, None)
