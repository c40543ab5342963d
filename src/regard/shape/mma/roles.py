"""Who is who in a conversation about images: image, question, answer; and the mask they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Mask
from regard.errors import InputError

GENERATED = -1  # stands for the id of a token that the model wrote itself


@dataclass(frozen=True)
class Roles:
    """Who is who in a batch, `[batch, tokens]` each.

    Attributes:
        image: 1 + turn of image tokens, 0 elsewhere.
        question: 1 + turn of text that is no answer, 0 elsewhere.
        answer: tokens of answers, from the assistant's role token on.
    """

    image: Tensor
    question: Tensor
    answer: Tensor

    def opened(self, turns: str) -> Tensor:
        """For every image token, whether a later question token is open to it."""
        later = [self.question.flip(-1).eq(t).cumsum(-1).flip(-1) > 0 for t in self._turns()]
        found = torch.zeros_like(self.answer)
        for t, has in zip(self._turns(), later):
            sees = self.image == t if turns == "first" else (self.image > 0) & (self.image <= t)
            found |= sees & has
        return found

    def _turns(self) -> list[int]:
        return list(range(1, int(max(self.image.max(), self.question.max())) + 1))

    def pairs(self, turns: str, mutual: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The rectangles: which queries and which keys, disjoint, to be cut to keys > queries."""
        for t in self._turns():
            if turns == "first":
                yield self.image == t, self.question == t
            else:
                yield (self.image > 0) & (self.image <= t), self.question == t
            if mutual == "both":
                yield self.question == t, self.image == t


def read_roles(
    ids: Tensor,
    image: Tensor,
    live: Tensor,
    labels: Tensor | None,
    marker: tuple[int, ...],
    user: tuple[int, ...],
    released: bool = False,
) -> Roles:
    """Read the roles off the tokens, `[batch, tokens]` each.

    Args:
        ids: `GENERATED` stands for what the model wrote.
        marker, user: as in `MMA`; empty when left out.
        released: whether the first token of the marker is open too.
    """
    if labels is not None and labels.shape != ids.shape:
        raise InputError(
            f"labels {tuple(labels.shape)} and input_ids {tuple(ids.shape)} differ in shape"
        )
    labelled = torch.zeros_like(live) if labels is None else (labels != -100) & live
    answer = ids == GENERATED
    for row in range(len(ids)):
        if not marker:
            answer[row] |= labelled[row]
            continue
        starts = _find(ids[row], marker)
        if not starts and bool(image[row].any()):
            raise InputError(
                f"row {row} has an image but no assistant marker {list(marker)}, so "
                "where its answer begins is not known: check marker against the chat template"
            )
        ends = _find(ids[row], user) if user else []
        for start in starts:
            end = next((e for e in ends if e > start), ids.shape[1])
            answer[row, start + released : end] = True
    if bool((labelled & ~answer).any()):
        row = int((labelled & ~answer).any(-1).int().argmax())
        raise InputError(
            f"row {row} has labels before its assistant marker: an image that sees them would "
            "know the answer; mask them with -100"
        )
    begins = answer[:, 1:] < answer[:, :-1]  # a turn ends where an answer does
    turn = 1 + torch.nn.functional.pad(begins.long().cumsum(-1), (1, 0))
    text = live & ~image & ~answer
    return Roles(turn * image, turn * text, answer)


def mma_mask(roles: Roles, turns: str = "first", mutual: str = "image_to_text") -> Mask:
    """The whole mask as a `core.Mask`, to look at.

    >>> image, question = torch.tensor([[0, 1, 1, 0, 0]]), torch.tensor([[1, 0, 0, 1, 0]])
    >>> print(mma_mask(Roles(image, question, torch.tensor([[0, 0, 0, 0, 1]]) > 0)).draw(5))
    ■ ⬚ ⬚ ⬚ ⬚
    ■ ■ ⬚ ■ ⬚
    ■ ■ ■ ■ ⬚
    ■ ■ ■ ■ ⬚
    ■ ■ ■ ■ ■
    """
    count = roles.image.shape[1]
    allowed = torch.ones(count, count, dtype=torch.bool).tril()[None]
    for rows, keys in roles.pairs(turns, mutual):
        allowed = allowed | (rows[:, :, None] & keys[:, None])
    return Mask.dense(allowed[:, None])


def token_ids(given: int | Sequence[int] | None, name: str) -> tuple[int, ...]:
    if given is None:
        return ()
    ids = (given,) if isinstance(given, int) else tuple(int(n) for n in given)
    if not ids:
        raise InputError(f"{name} is empty: give the token ids of the role, or leave it out")
    return ids


def _find(ids: Tensor, pattern: tuple[int, ...]) -> list[int]:
    """Where the pattern begins."""
    if len(ids) < len(pattern):
        return []
    windows = ids.unfold(0, len(pattern), 1)
    found: list[int] = (
        (windows == torch.tensor(pattern, device=ids.device)).all(-1).nonzero()[:, 0].tolist()
    )
    return found
