"""The doors into models."""

from .call import Call, Handler, Site
from .collect import Collector
from .session import Session

__all__ = ["Call", "Collector", "Handler", "Session", "Site"]
