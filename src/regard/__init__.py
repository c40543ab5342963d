"""See, steer, shrink and shape the attention of any Transformer.

>>> import regard
>>> sorted(n for n in ("watch", "load") if hasattr(regard, n))
['load', 'watch']
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module it comes from; nothing is imported before it is asked for
_LAZY = {
    "watch": "regard.api",
    "apply": "regard.api",
    "ACT": "regard.steer",
    "HeadFilter": "regard.steer.act_heads",
    "ContrastiveExpertGuidance": "regard.steer",
    "VAR": "regard.steer",
    "StructuredDiffusion": "regard.steer",
    "DynamicPromptLearning": "regard.steer.dynamic_prompt_learning",
    "WordMaps": "regard.see.words",
    "JointMaps": "regard.see.joint",
    "MMA": "regard.shape",
    "TaskKV": "regard.shrink",
    "Recycled": "regard.shrink",
    "VisionDrop": "regard.shrink",
    "Watch": "regard.api",
    "facts": "regard.api",
    "load": "regard.zoo",
    "models": "regard.zoo",
    "methods": "regard.catalog",
    "check": "regard.reach.check",
}
_MODULES = ("core", "zoo", "reach", "see", "steer", "shrink", "shape", "report", "reproduce")

__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from regard.api import Watch as Watch
    from regard.api import apply as apply
    from regard.api import facts as facts
    from regard.api import watch as watch
    from regard.catalog import methods as methods
    from regard.reach.check import check as check
    from regard.shape import MMA as MMA
    from regard.shrink import Recycled as Recycled
    from regard.shrink import TaskKV as TaskKV
    from regard.shrink import VisionDrop as VisionDrop
    from regard.steer import ACT as ACT
    from regard.steer import VAR as VAR
    from regard.steer import ContrastiveExpertGuidance as ContrastiveExpertGuidance
    from regard.steer.act_heads import HeadFilter as HeadFilter
    from regard.zoo import load as load
    from regard.zoo import models as models


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"regard.{name}")
    raise AttributeError(f"module 'regard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_MODULES])
