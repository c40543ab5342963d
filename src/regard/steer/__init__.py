"""Better answers or images from the same weights, no training."""

from regard.catalog import lazy

__getattr__, __dir__ = lazy(__name__)
