"""Synthetic texts with topics: every topic has words of its own and a chain that says which of them
follows which; glue words are shared. Token ids: 0 begins, then glue, then the words of each topic,
then noise words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import InputError

SURE = 0.9  # chance of the chain's own next word


@dataclass(frozen=True)
class Topics:
    """A vocabulary of `count` topics of `words` each; `noise` words are drawn evenly.

    Called with token ids it numbers their blocks, as `LocalityDial(blocks=...)` wants it.

    >>> topics = Topics()
    >>> topics(torch.tensor([0, 3, 9, 17])).tolist(), topics.vocabulary
    ([0, 0, 1, 2], 41)
    """

    count: int = 4
    words: int = 8
    glue: int = 8
    noise: int = 0
    seed: int = 0

    @property
    def names(self) -> list[str]:
        return [f"topic {n}" for n in range(self.count)]

    @property
    def vocabulary(self) -> int:
        return 1 + self.glue + self.count * self.words + self.noise

    def __call__(self, ids: Tensor) -> Tensor:
        block = (ids - 1 - self.glue).div(self.words, rounding_mode="floor") + 1
        return torch.where((ids <= self.glue) | (block > self.count), 0, block)

    def draw(
        self, rows: int, length: int, seed: int, among: tuple[int, ...] | None = None, run: int = 1,
        noisy: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Texts `[rows, length]` of two topics each that take turns.

        Args:
            among: the topics that may occur; all when None.
            run: words of a topic at a time, on average.
            noisy: share of turns that are noise words.
        """
        among = tuple(range(self.count)) if among is None else among
        if len(among) < 2:
            raise InputError("a text interleaves two topics: name two at least")
        chain = torch.Generator().manual_seed(self.seed)
        follow = torch.zeros(self.count, self.words, dtype=torch.long)
        for number in range(self.count):  # one round through all words
            order = torch.randperm(self.words, generator=chain)
            follow[number, order] = order.roll(-1)
        make = torch.Generator().manual_seed(seed)

        def rand(*size: int) -> Tensor:
            return torch.rand(*size, generator=make)

        at = torch.arange(rows)
        pair = torch.stack([torch.randperm(len(among), generator=make)[:2] for _ in range(rows)])
        pair = torch.tensor(among)[pair]
        words = torch.randint(self.words, (rows, self.count), generator=make)
        side, loud = (rand(rows) < 0.5).long(), torch.zeros(rows, dtype=torch.bool)
        text = torch.zeros(rows, length, dtype=torch.long)
        first = 1 + self.glue
        for t in range(1, length):
            turn = rand(rows) < 1 / run
            side = torch.where(turn & (rand(rows) < (0.5 if run == 1 else 1)), 1 - side, side)
            loud = torch.where(turn, rand(rows) < noisy, loud)
            topic = pair[at, side]
            own = follow[topic, words[at, topic]]
            other = torch.randint(self.words, (rows,), generator=make)
            new = torch.where(rand(rows) < SURE, own, other)
            glue = rand(rows) < 0.15
            said = torch.where(
                glue, 1 + torch.randint(max(self.glue, 1), (rows,), generator=make),
                first + topic * self.words + new,
            )  # fmt: skip
            if self.noise:
                start = first + self.count * self.words
                any_ = start + torch.randint(self.noise, (rows,), generator=make)
                said = torch.where(loud, any_, said)
            quiet = ~glue & ~loud
            words[at[quiet], topic[quiet]] = new[quiet]
            text[:, t] = said
        return text
