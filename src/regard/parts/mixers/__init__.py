"""Token mixers and the language model that takes one for every layer.

`from regard.parts import mixers` registers the model with transformers' Auto classes.
"""

from __future__ import annotations

from .config import MixerConfig
from .kinds import KEEPS, KINDS, SEVEN, kept, named, placed, simple
from .look import indicators, look, looks, sink_rates
from .model import MixerForCausalLM, MixerModel, counts

__all__ = [
    "KEEPS", "KINDS", "SEVEN", "MixerConfig", "MixerForCausalLM", "MixerModel",
    "counts", "indicators", "kept", "look", "looks", "named", "placed", "simple", "sink_rates",
]  # fmt: skip
