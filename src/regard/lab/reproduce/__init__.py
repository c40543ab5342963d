"""Papers' claims measured on this machine: with control, interval and verdict.

>>> "act" in available()
True
"""

from .harness import Claim, Interval, Result, available, run
from .page import page, page_text, read, table

__all__ = [
    "Claim",
    "Interval",
    "Result",
    "available",
    "page",
    "page_text",
    "read",
    "run",
    "table",
]
