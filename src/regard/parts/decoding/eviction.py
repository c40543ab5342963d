"""Rules that cut the prompt's cache to the same number of rows for every key head.

Deviations of all of them:
- The prompt is cut once, after it was read, and later tokens are all kept; some of the papers go on
  evicting while they decode.
- Positions stay those of the text; one paper counts them within the cache.
- The query heads of a key head share one list, chosen by the mean of their attention.
"""

from __future__ import annotations

from torch import Tensor

from regard.cards import Budget
from regard.core import State
from regard.errors import InputError
from regard.reach import Call

from .kept import Evicting, Group


class EqualRows(Budget, Evicting):
    """Base of the rules: `pick` says which rows stay."""

    least = 1  # rows that the rule needs at the least

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.budget < self.least:
            raise InputError(
                f"a budget of {self.budget} rows is too small for {self.name}: take {self.least} "
                "or more"
            )

    @property
    def neutral(self) -> bool:
        return self.ratio == 1

    def choose(self, call: Call, state: State) -> list[Group]:
        tokens = call.k.shape[2]
        rows = self.rows(tokens)
        if rows >= tokens:
            return [Group(call.k, call.v)]
        return [Group(call.k, call.v, positions=self.pick(call, state, rows))]

    def pick(self, call: Call, state: State, rows: int) -> Tensor:
        """Positions of the rows that stay, ascending, `[batch, kv_heads, rows]`."""
        raise NotImplementedError
