"""Rules that cut the prompt's cache to the same number of rows for every key head: what Task-KV and
Recycled Attention are compared with.

Papers: "Efficient Streaming Language Models with Attention Sinks", Xiao et al., 2023, arXiv
2309.17453 (`StreamingLLM`); "SnapKV: LLM Knows What You are Looking for Before Generation", Li et
al., 2024, arXiv 2404.14469 (`SnapKV`); "H2O: Heavy-Hitter Oracle for Efficient Generative Inference
of Large Language Models", Zhang et al., 2023, arXiv 2306.14048 (`H2O`). Written from the published
rules.

Deviations:
- The prompt is cut once, after it was read, and later tokens are all kept: StreamingLLM and H2O go
  on evicting while they decode.
- Positions stay those of the text: StreamingLLM counts them within the cache.
- The query heads of a key head share one list, chosen by the mean of their attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError
from regard.reach import Call
from regard.reach.cache import check_number, check_whole

from .kept import Evicting, Group, check_pool, ends_and_best, grouped, observed, pooled


class EqualRows(Evicting):
    """Every key head keeps `budget` rows of the prompt, or `ratio` of them; a rule says which.

    >>> import regard
    >>> model = regard.zoo.tiny("llama")
    >>> with torch.no_grad(), regard.apply(model, method := SnapKV(ratio=0.25, window=4)):
    ...     ids = model.generate(torch.arange(3, 83)[None], max_new_tokens=1)
    >>> method.nbytes / method.full_nbytes
    0.25

    Raises:
        InputError: both or neither of budget and ratio, or out of range; a padded prompt, a model
            without a cache or with another than causal attention.
    """

    def __init__(self, *, budget: int | None, ratio: float | None, least: int = 1) -> None:
        super().__init__()
        if (budget is None) == (ratio is None):
            raise InputError(f"{self.name} takes either budget (rows) or ratio (of the prompt)")
        if ratio is not None:
            check_number("ratio", ratio)
            if not 0 < ratio <= 1:
                raise InputError(f"ratio is the share of the cache that is kept, not {ratio}")
        if budget is not None:
            check_whole("budget", budget, 1)
            if budget < least:
                raise InputError(
                    f"a budget of {budget} rows is too small for {self.name}: take {least} or more"
                )
        self.budget, self.ratio = budget, ratio

    @property
    def neutral(self) -> bool:
        return self.ratio == 1

    def rows(self, tokens: int) -> int:
        """How many rows each head keeps of a prompt of so many tokens."""
        if self.budget is not None:
            return min(self.budget, tokens)
        return max(1, math.floor((self.ratio or 1) * tokens + 1e-9))

    def choose(self, call: Call, state: State) -> list[Group]:
        tokens = call.k.shape[2]
        rows = self.rows(tokens)
        if rows >= tokens:
            return [Group(call.k, call.v)]
        return [Group(call.k, call.v, positions=self.pick(call, state, rows))]

    def pick(self, call: Call, state: State, rows: int) -> Tensor:
        """Positions of the rows that stay, ascending, `[batch, kv_heads, rows]`."""
        raise NotImplementedError


class StreamingLLM(EqualRows):
    """The first `sinks` tokens and the most recent ones.

    >>> StreamingLLM(budget=64).rows(1000)
    64
    """

    name = "StreamingLLM"

    def __init__(
        self, *, budget: int | None = None, ratio: float | None = None, sinks: int = 4
    ) -> None:
        check_whole("sinks", sinks, 0)
        super().__init__(budget=budget, ratio=ratio, least=sinks + 1)
        self.sinks = sinks

    def pick(self, call: Call, state: State, rows: int) -> Tensor:
        first = min(self.sinks, rows - 1)
        none = call.k.new_zeros(call.k.shape[:3])
        return ends_and_best(none, first, 0, rows - first)


class SnapKV(EqualRows):
    """The last `window` tokens, and the earlier ones that they look at most.

    Scores are averaged over `pool` neighbours. A budget that the window fills keeps recent tokens
    alone.
    """

    name = "SnapKV"

    def __init__(
        self,
        *,
        budget: int | None = None,
        ratio: float | None = None,
        window: int = 32,
        pool: int = 7,
    ) -> None:
        check_whole("window", window, 1)
        check_pool(pool)
        super().__init__(budget=budget, ratio=ratio, least=window + 1)
        self.window, self.pool = window, pool

    def pick(self, call: Call, state: State, rows: int) -> Tensor:
        last = min(self.window, rows)
        scores = grouped(observed(call, state, self.window), call.k.shape[1])
        # the window's own columns do not leak into their neighbours' averages
        scores[..., scores.shape[-1] - last :] = 0
        return ends_and_best(pooled(scores, self.pool), 0, rows - last, last)


class H2O(EqualRows):
    """Recent tokens, `recent` of the rows, and the heavy hitters: those that received most
    attention from all queries of the prompt together.
    """

    name = "H2O"

    def __init__(
        self, *, budget: int | None = None, ratio: float | None = None, recent: float = 0.5
    ) -> None:
        check_number("recent", recent)
        if not 0 <= recent <= 1:
            raise InputError(
                f"recent is the share of the rows kept for recent tokens, not {recent}"
            )
        super().__init__(budget=budget, ratio=ratio, least=2)
        self.recent = recent

    def pick(self, call: Call, state: State, rows: int) -> Tensor:
        last = round(self.recent * rows)
        scores = grouped(observed(call, state, None), call.k.shape[1])
        return ends_and_best(scores, 0, rows - last, last)


class RandomEviction(EqualRows):
    """Tokens drawn at random, other ones for every layer and key head: the control."""

    name = "RandomEviction"

    def __init__(
        self, *, budget: int | None = None, ratio: float | None = None, seed: int = 0
    ) -> None:
        super().__init__(budget=budget, ratio=ratio)
        check_whole("seed", seed, 0)
        self.seed = seed

    def pick(self, call: Call, state: State, rows: int) -> Tensor:
        draw: Any = torch.Generator().manual_seed(self.seed * 100_003 + call.site.index)
        # the rows of a batch draw alike, so that each gets what it gets alone
        scores = torch.rand(1, *call.k.shape[1:3], generator=draw).expand(len(call.k), -1, -1)
        return ends_and_best(scores.to(call.k.device), 0, rows, 0)
