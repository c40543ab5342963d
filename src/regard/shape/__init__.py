"""New attention, trained: layers, losses, heads, models."""

from regard.catalog import lazy

__getattr__, __dir__ = lazy(__name__)
