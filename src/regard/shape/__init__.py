"""New attention, trained: layers, losses, masks, models."""

from .mma import MMA

__all__ = ["MMA"]
