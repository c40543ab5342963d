"""Papers' claims measured on this machine: with control, interval and verdict.

>>> "act" in available()
True
"""

from regard.reproduce.harness import Claim, Interval, Result, available, run
from regard.reproduce.page import page, page_text, read, table

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
