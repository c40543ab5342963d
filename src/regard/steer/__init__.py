"""Better answers from the same weights, without training."""

from .act import ACT
from .steer import ContrastiveExpertGuidance
from .structured_diffusion import StructuredDiffusion
from .var import VAR

__all__ = ["ACT", "VAR", "ContrastiveExpertGuidance", "StructuredDiffusion"]
