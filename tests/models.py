"""Tiny stand-ins that tests of several packages share."""

from __future__ import annotations

import copy
from typing import Any

from regard.zoo.tiny import tiny


def deep(layers: int, steep: float) -> Any:
    """A tiny model of more layers, so that ACT leaves some to act on; steep enough for sinks."""
    small = tiny("llama")
    config = copy.deepcopy(small.config)
    config.num_hidden_layers = layers
    model = type(small)(config).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= steep
    return model
