"""Numbers as exact as their tensors, whatever a model is run under."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_given(x: Tensor) -> AbstractContextManager[object]:
    """A context in which products keep the dtype of their tensors: `torch.autocast` would compute
    those of float32 in 16 bits.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
