"""Better answers from the same weights, without training."""

from .act import ACT

__all__ = ["ACT"]
