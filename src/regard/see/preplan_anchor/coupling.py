"""Whether the beats of many responses go together, and what forcing another token changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError

from .method import Rhythm


@dataclass(frozen=True)
class Coupling:
    """One coupling over many responses, against marks at shuffled places.

    Attributes:
        observed, random: the quantity at the marks, and its mean over shuffles.
        lift: observed / random - 1; low, high: its 95 % bootstrap interval over responses.
        p: share of shuffles that reach the observed value, one-sided, never 0.
        marks: how many marks there were in all.
    """

    name: str
    observed: float
    random: float
    lift: float
    low: float
    high: float
    p: float
    marks: int


def couplings(
    rhythms: Sequence[Rhythm],
    *,
    follow: int = 1,
    shuffles: int = 2000,
    seed: int = 0,
    control: str = "shuffle",
) -> dict[str, Coupling]:
    """The three couplings of the paper, pooled over responses.

    "entropy": mean token entropy at WAAD peaks; "receiver": share of the receiver heads' FAI peaks
    that are FAI peaks of the global heads; "follow": share of FAI peaks with a WAAD peak at the
    same place or up to `follow` before. Each against marks thrown anywhere in the same response
    (`control="shuffle"`, the paper's) or turned round as a whole, which keeps their spacing
    (`control="rotate"`).

    Raises:
        InputError: no response has marks, a control that does not exist.
    """
    if control not in ("shuffle", "rotate"):
        raise InputError(f"the control is 'shuffle' or 'rotate', not {control!r}")
    if follow < 0 or shuffles < 1:
        raise InputError(
            f"follow is at least 0 and shuffles at least 1, not {follow} and {shuffles}"
        )
    random = torch.Generator().manual_seed(seed)
    pooled = {}
    for name in ("entropy", "receiver", "follow"):
        pairs = [_worth(name, r, follow) for r in rhythms if r.counted > 2]
        pairs = [(worth, marks) for worth, marks in pairs if marks]
        if not pairs:
            raise InputError(f"no response has a mark for the coupling {name!r}: take longer ones")
        pooled[name] = _against_chance(name, pairs, shuffles, control, random)
    return pooled


def _worth(name: str, seen: Rhythm, follow: int) -> tuple[Tensor, list[int]]:
    """What a mark at each place is worth, `[counted]`, and where the marks are."""
    if name == "entropy":
        return torch.tensor(seen.entropy[: seen.counted]), seen.preplan
    worth = torch.zeros(seen.counted)
    if name == "receiver":
        worth[seen.anchor] = 1.0
        return worth, seen.receiver_peaks
    for place in seen.preplan:
        worth[place : place + follow + 1] = 1.0
    return worth, seen.anchor


def _against_chance(
    name: str,
    pairs: list[tuple[Tensor, list[int]]],
    shuffles: int,
    control: str,
    random: torch.Generator,
) -> Coupling:
    marks = torch.tensor([len(m) for _, m in pairs], dtype=torch.float64)
    sums = torch.stack([worth[m].double().sum() for worth, m in pairs])
    drawn = torch.stack([_thrown(worth, m, shuffles, control, random) for worth, m in pairs])
    observed, chance = float(sums.sum() / marks.sum()), drawn.sum(0) / marks.sum()
    mean = float(chance.mean())
    # the interval: responses drawn again with repetition, each with its own chance level
    again = torch.randint(len(pairs), (shuffles, len(pairs)), generator=random)
    level = drawn.mean(1)
    lifts = sums[again].sum(1) / level[again].sum(1).clamp_min(1e-12) - 1
    low, high = lifts.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    p = (1 + int((chance >= observed - 1e-12).sum())) / (1 + shuffles)
    lift = observed / mean - 1 if mean > 0 else float("nan")
    return Coupling(name, observed, mean, lift, low, high, p, int(marks.sum()))


def _thrown(
    worth: Tensor, marks: list[int], shuffles: int, control: str, random: torch.Generator
) -> Tensor:
    """Sum of what the marks are worth at chance places, `[shuffles]`."""
    if control == "rotate":
        turn = torch.randint(len(worth), (shuffles, 1), generator=random)
        places = (torch.tensor(marks)[None] + turn) % len(worth)
    else:
        keys = torch.rand(shuffles, len(worth), generator=random)
        places = keys.topk(len(marks), -1).indices
    return worth.double()[places].sum(-1)


def perturb(
    model: Any,
    tokenizer: Any,
    input_ids: Any,
    position: int,
    *,
    alternatives: int = 3,
    new_tokens: int = 40,
) -> float:
    """How much of a continuation survives another token at `position`: mean Jaccard, in [0, 1].

    Each of the model's `alternatives` next choices takes the token's place; the greedy
    continuations are compared with the one after the token itself by their content words. The rows
    have the same length, so that they run as one batch without padding.

    Raises:
        InputError: a position out of range, no alternatives.
    """
    ids = torch.as_tensor(input_ids).reshape(-1).cpu()
    if not 0 < position < len(ids):
        raise InputError(f"position {position} is out of range: 1 to {len(ids) - 1}")
    if alternatives < 1 or new_tokens < 1:
        raise InputError("alternatives and new_tokens are at least 1")
    said = int(ids[position])
    with torch.no_grad():
        logits = model(ids[None, :position].to(model.device), use_cache=False).logits[0, -1]
        logits[said] = -torch.inf
        other = logits.topk(alternatives).indices.tolist()
        before = ids[:position].repeat(1 + alternatives, 1)
        rows = torch.cat([before, torch.tensor([[n] for n in [said, *other]])], 1).to(model.device)
        continued = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    tails = tokenizer.batch_decode(continued[:, position + 1 :], skip_special_tokens=True)
    words = [content_words(tail) for tail in tails]
    return sum(jaccard(words[0], w) for w in words[1:]) / alternatives


def jaccard(a: Iterable[str], b: Iterable[str]) -> float:
    """Shared over all words of two sets; 1 when both are empty."""
    one, two = set(a), set(b)
    return len(one & two) / len(one | two) if one | two else 1.0


def content_words(text: str) -> set[str]:
    """The words of a text that carry content, lower case; numbers count.

    >>> sorted(content_words("So the 3 apples, and then 4 more"))
    ['3', '4', 'apples', 'more']
    """
    return {w for w in re.findall(r"[a-z]+|\d+", text.lower()) if w not in _STOP}


_STOP_TEXT = """
a about after all also am an and are as at be because been before but by can could did do does for
from had has have he her here him his how i if in into is it its just let me my no not now of on or
our she should so some than that the their them then there these they this those to up us was we
were what when where which who will with would you your s t
"""
_STOP = frozenset(_STOP_TEXT.split())
