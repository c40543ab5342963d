"""What `generate` tells: its settings before the first token, and which rows of a batch have ended
and get padding from then on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList

from . import dispatch

_plain = GenerationMixin._get_stopping_criteria
_plain_validate = GenerationMixin._validate_generation_mode


def follow() -> None:
    """Stand before the stopping criteria of every generation."""
    GenerationMixin._get_stopping_criteria = _get  # type: ignore[method-assign]
    GenerationMixin._validate_generation_mode = _validate  # type: ignore


def leave() -> None:
    """Undo `follow`."""
    GenerationMixin._get_stopping_criteria = _plain  # type: ignore[method-assign]
    GenerationMixin._validate_generation_mode = _plain_validate  # type: ignore[method-assign]


def _validate(self: Any, mode: Any, config: Any, given: dict[str, Any]) -> None:
    """Note what the settings do not tell: whether there is an assistant."""
    dispatch.set_assisted(given.get("assistant_model") is not None)
    _plain_validate(self, mode, config, given)


def _get(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    criteria = _plain(self, generation_config, *args, **kwargs)
    sessions = [s for s in dispatch.open_sessions() if s.concerns(self)]
    if not sessions:
        return criteria
    for session in sessions:
        for handler in session.handlers:
            handler.generation(generation_config)
    dispatch.set_padding(None)
    dispatch.set_before_first_token(getattr(generation_config, "num_beams", 1) == 1)
    return criteria if getattr(generation_config, "num_beams", 1) != 1 else _Ended(criteria)


class _Ended(StoppingCriteriaList):
    """The same criteria; notes how many tokens of padding every row has had since its end."""

    done: Tensor | None = None
    padding: Tensor

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        dispatch.set_before_first_token(False)
        if self.done is None:
            self.done = torch.zeros_like(done)
            self.padding = torch.zeros(len(done), dtype=torch.long, device=done.device)
        self.padding = self.padding + self.done
        self.done = self.done | done
        dispatch.set_padding(None if bool(self.done.all()) else self.padding)
        return done
