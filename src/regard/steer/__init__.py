"""Better answers from the same weights, without training."""

from .act import ACT
from .steer import ContrastiveExpertGuidance

__all__ = ["ACT", "ContrastiveExpertGuidance"]
