"""Which kernel, mask and parallel scheme is fastest here."""

from regard.catalog import lazy

__getattr__, __dir__ = lazy(__name__)
