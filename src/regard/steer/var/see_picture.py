"""What `regard see` shows of a picture besides attention: its sink tokens."""

from __future__ import annotations

from typing import Any

from regard.errors import InputError

from .dims import find_sink_dims
from .method import VAR


def sinks(model: Any, inputs: Any) -> tuple[VAR | None, str]:
    """A handler that finds sink tokens and moves nothing, or None and why there is none."""
    size = int(model.config.get_text_config().hidden_size)
    try:
        dims = find_sink_dims(model, [inputs])
    except InputError as problem:
        return None, f"no sinks are marked: {problem}"
    return VAR(move=0.0, dims=dims, tau=0.5 * size**0.5), ""
