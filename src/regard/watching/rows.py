"""What a token looks at: its exact rows of the attention map."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from regard.errors import InputError, ReachError

# what a forward is given of a cache, and what follows from the text itself
_OF_A_STEP = {"past_key_values", "cache_position", "position_ids", "use_cache", "logits_to_keep"}


def occurrences(word: str, pieces: Sequence[str]) -> list[tuple[int, ...]]:
    """Tokens of every place where the text, given in pieces, holds a word; of whole words if there
    are any, else of parts of words.

    >>> occurrences("tired", ["The", " cat", " was", " ti", "red", "."])
    [(3, 4)]
    """
    text, ends = "".join(pieces), list[int]()
    for piece in pieces:
        ends.append((ends[-1] if ends else 0) + len(piece))
    starts = [0, *ends]
    whole = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    spans = whole or [m.span() for m in re.finditer(re.escape(word), text)]
    return [
        tuple(n for n, end in enumerate(ends) if starts[n] < stop and end > start)
        for start, stop in spans
    ]


def positions(
    token: str | int | Sequence[int], pieces: Sequence[str], occurrence: int | None = None
) -> tuple[int, ...]:
    """The tokens meant by a word of the text, or by a position (from the end where negative).

    Args:
        occurrence: which one, from 0, where the text holds the word several times.

    Raises:
        InputError: a word that the text does not hold or holds several times, a position beyond it.

    >>> positions(-1, ["The", " cat"])
    (1,)
    """
    count = len(pieces)
    if isinstance(token, (list, tuple)) and token:
        return tuple(n for one in token for n in positions(one, pieces))
    if isinstance(token, int) and not isinstance(token, bool):
        if not -count <= token < count:
            raise InputError(f"token {token} is out of range: the text has {count} tokens, from 0")
        return (token % count,)
    if not isinstance(token, str) or not token.strip():
        raise InputError(f"a token is a word of the text or a position, not {token!r}")
    word = token.strip()
    places = occurrences(word, pieces)
    if not places:
        raise InputError(f"the text does not hold {word!r}: give a word as it stands there, or the "
                         "position of a token")  # fmt: skip
    if occurrence is None and len(places) > 1:
        shown = ", ".join(f"{n} at token {place[0]}" for n, place in enumerate(places[:8]))
        raise InputError(
            f"{word!r} stands in the text {len(places)} times ({shown}): say which with "
            "occurrence=, or give the position of the token"
        )
    wanted = occurrence or 0
    if not -len(places) <= wanted < len(places):
        raise InputError(
            f"occurrence {wanted} of {word!r} is out of range: there are {len(places)}, from 0"
        )
    return places[wanted]


def seen_again(seen: Any, queries: Sequence[int]) -> Any:
    """A `Watch` of the rows of these queries, from one more forward over what `seen` has seen.

    Raises:
        ReachError: what was seen cannot be run again from its token ids.
    """
    from regard.core import Rows

    from .session import Watch

    given = seen.inputs
    kept = f"core.Rows(queries={tuple(queries)})"
    if given is None or seen.input_ids is None or seen.record.end != seen.input_ids.shape[1]:
        raise ReachError(
            "the rows of a token come from one more forward over the token ids, and this run was "
            f"given something else: ask for the rows beforehand, watch(model, [{kept}])"
        )
    if getattr(seen.model.config, "is_encoder_decoder", False):
        raise ReachError(
            f"{type(seen.model).__name__} reads two texts: ask for the rows beforehand, "
            f"watch(model, [{kept}], part=...)"
        )
    ids = seen.input_ids.to(seen.model.device)
    call = {n: x for n, x in given.items() if n not in _OF_A_STEP}
    mask = call.get("attention_mask")
    if torch.is_tensor(mask):
        more = ids.shape[1] - mask.shape[-1]
        mask = torch.cat([mask, mask.new_ones(len(mask), more)], 1) if more > 0 else mask
        call["attention_mask"] = mask
        if given.get("position_ids") is not None:
            call["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    again = Watch(seen.model, [Rows(tuple(queries))], part=seen.main, tokenizer=seen.tokenizer)
    with torch.no_grad(), again:
        seen.model(**{**call, "input_ids": ids})
    return again


def table_of(layers: Any, tokens: Sequence[str], top: int = 5) -> list[list[str]]:
    """One line a layer: the tokens that are read most, mean over heads, and the largest single
    share of a head.
    """
    lines = []
    for layer, row in layers.items():  # [heads, keys]
        best = row.mean(0).topk(min(top, row.shape[-1]))
        pairs = zip(best.values.tolist(), best.indices.tolist())
        read = ", ".join(f"{tokens[n].strip()} @{n} {v:.2f}" for v, n in pairs)
        head, key = divmod(int(row.argmax()), row.shape[-1])
        largest = f"head {head}: {tokens[key].strip()} @{key} {float(row[head, key]):.2f}"
        lines.append([str(layer), read, largest])
    return lines
