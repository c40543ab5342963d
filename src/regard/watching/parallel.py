"""`regard.watch` over a text that is sharded across ranks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.core import Fact
from regard.core.parallel import Parallel
from regard.errors import InputError
from regard.reach.parallel import Shared, SharedCollector, forward, prove, suits

from .session import Watch


class SharedWatch(Watch):
    """A `Watch` over one forward on all ranks; every rank ends up with the facts of the whole text.

    Use it under torchrun, within `core.parallel.started()`, with the same arguments on every rank.

    Args:
        model: a loaded decoder, the same on every rank.
        ids: the whole text, `[batch, tokens]`, the same on every rank.
        scheme: how keys travel; ring works with any number of heads.
    """

    def __init__(
        self,
        model: Any,
        facts: Sequence[str | Fact],
        ids: Tensor,
        *,
        scheme: str = "ring",
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        tokenizer: Any = None,
        timeout: float = 600.0,
    ) -> None:
        super().__init__(model, facts, layers=layers, heads=heads, tokenizer=tokenizer)
        suits(model)
        self.ids = ids
        try:
            self.run = Parallel(scheme, ids.shape[1], timeout=timeout)
        except ValueError as error:
            raise InputError(str(error)) from None
        self._collector = SharedCollector(self.facts, layers, heads)
        self.handlers = [Shared(self.run), self._collector]
        self._wanted = [{s.index for s in h.sites(self.sites)} for h in self.handlers]

    def see(self) -> SharedWatch:
        """Check that the ranks together agree with one process, then run once over the text."""
        prove(self.model, self.run, self.ids)
        more: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            more["logits_to_keep"] = 1  # no logits are needed
        with torch.no_grad(), self:
            forward(self.model, self.run, self.ids, **more)
        self.input_ids = self.ids.detach().cpu()
        return self
