"""What `regard.watch` returns: results, tables, and the data of pages."""

from .session import Layers, Watch, apply, facts, watch

__all__ = ["Layers", "Watch", "apply", "facts", "watch"]
