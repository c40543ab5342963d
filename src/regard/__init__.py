"""See, steer, shrink and shape the attention of any Transformer.

>>> import regard
>>> sorted(n for n in ("watch", "load") if hasattr(regard, n))
['load', 'watch']
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name -> module it comes from; nothing is imported before it is asked for. The methods' own names
# are read from their cards: see `regard.catalog`.
_LAZY = {
    "watch": "regard.watching",
    "apply": "regard.watching",
    "Watch": "regard.watching",
    "facts": "regard.watching",
    "WordMaps": "regard.parts.diffusion.words",
    "JointMaps": "regard.parts.diffusion.joint",
    "load": "regard.zoo",
    "models": "regard.zoo",
    "methods": "regard.catalog",
    "check": "regard.lab.check",
    "Telemetry": "regard.parts.training.telemetry",
}
_MODULES = {
    **{n: f"regard.{n}" for n in ("core", "zoo", "reach", "parts", "watching", "report", "errors")},
    **{n: f"regard.{n}" for n in ("see", "steer", "shrink", "shape", "bench", "lab")},
    "reproduce": "regard.lab.reproduce",
    "trials": "regard.lab.trials",
}


def _exports() -> dict[str, str]:
    from regard.catalog import exports

    return exports()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(_MODULES[name])
    if not name.startswith("_"):
        known = _exports()
        if name in known:
            return getattr(import_module(known[name]), name)
    raise AttributeError(f"module 'regard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES, *_exports()})
