"""Maps over pieces and encoder steps: pooled, correlated, and laid beside the true word times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.reach import Call, Handler, Session, Site

from .deletion import words_of
from .forced import Forced


class _Cross(Handler):
    """Keeps the cross attention of every layer, `[heads, pieces, steps]`, of one short clip."""

    def __init__(self, rows: slice) -> None:
        self.rows, self.maps = rows, dict[int, Tensor]()

    def sites(self, sites: list[Site]) -> list[Site]:
        cross = [s for s in sites if s.kind == "cross"]
        if not cross:
            raise InputError(
                "this model has no cross attention: name an encoder-decoder, such as "
                "whisper-tiny.en"
            )
        return cross

    def after(self, call: Call, state: Any) -> None:
        q = call.q[0, :, self.rows].float()
        k = call.k[0].float().repeat_interleave(len(q) // call.k.shape[1], 0)
        scores = q @ k.transpose(1, 2) * call.scale
        self.maps[call.site.layer] = (scores - state.lse[0, :, self.rows, None].float()).exp().cpu()


def cross_attention(forced: Forced) -> tuple[Tensor, float]:
    """Cross attention of all layers and heads, and the mean share that falls on padding.

    Returns `[layers, heads, pieces, steps]` over the steps that hear sound, not rescaled.

    Raises:
        InputError: a model without cross attention.
    """
    seen = _Cross(forced.rows)
    with torch.inference_mode(), Session(forced.clip.model, [seen]):
        forced.log_probs(forced.clip.states[None])
    whole = torch.stack([seen.maps[n] for n in sorted(seen.maps)])
    kept = whole[..., : forced.clip.steps]
    return kept.clone(), float(1 - kept.sum(-1).mean())


def pool(map: Tensor, stride: int, steps: int) -> Tensor:
    """2-D max pooling: `[pieces, rows, frames]` -> `[pieces, steps]`, over all rows and the
    `stride` frames of each step; the last step takes what there is.

    >>> pool(torch.tensor([[[1.0, 5.0, 2.0], [0.0, 3.0, 4.0]]]), 2, 2)
    tensor([[5., 4.]])
    """
    most = map.amax(1)
    short = steps * stride - most.shape[1]
    if short > 0:
        most = torch.nn.functional.pad(most, (0, short), value=-torch.inf)
    return most[:, : steps * stride].unflatten(1, (steps, stride)).amax(-1)


def standardised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows less their mean, over their population deviation, float64; constant rows become zeros.

    Returns the rows and which of them were constant.

    >>> standardised(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))[0]
    tensor([[-1.,  1.],
            [ 0.,  0.]], dtype=torch.float64)
    """
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    flat = spread <= 1e-12 * x.abs().amax(-1, keepdim=True).clamp_min(1e-300)
    return torch.where(flat, 0.0, centred / spread.clamp_min(1e-300)), flat[..., 0]


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of row-standardised maps `[..., pieces, steps]`, flattened: `[...]`.

    Without constant rows it is the mean of the correlations of the rows. NaN when all rows of one
    of the two are constant.

    >>> x = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 0.0]])
    >>> float(pearson(x, 2 * x + 1)), float(pearson(x, -x))
    (1.0, -1.0)
    """
    a, b = standardised(a)[0], standardised(b)[0]
    top = (a * b).sum((-2, -1))
    return top / (a.square().sum((-2, -1)) * b.square().sum((-2, -1))).sqrt()


def ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis, ties sharing their mean.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0]))
    tensor([1.5000, 0.0000, 1.5000], dtype=torch.float64)
    """
    ordered, _ = x.sort(-1)
    below = torch.searchsorted(ordered.contiguous(), x.contiguous())
    upto = torch.searchsorted(ordered.contiguous(), x.contiguous(), right=True)
    return (below + upto - 1).double() / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """The same with each row replaced by its ranks."""
    return pearson(ranks(a), ranks(b))


def split_half(halves: Tensor) -> tuple[float, float]:
    """Reliability of a map from two halves `[2, pieces, steps]`: their correlation r, and what it
    comes to for the whole by Spearman and Brown, 2 r / (1 + r).

    The correlation of anything with a map of reliability R stays below the root of R. A map whose
    halves are constant tells nothing: its reliability is 0.

    >>> x = torch.tensor([[1.0, 2.0, 4.0]])
    >>> split_half(torch.stack([x, x]))
    (1.0, 1.0)
    """
    r = float(pearson(halves[0], halves[1]).nan_to_num(0.0))
    return r, 2 * r / (1 + r) if r > -1 else -1.0


def groups(cross: Tensor) -> dict[str, Tensor]:
    """Cross attention `[layers, heads, pieces, steps]` averaged over groups of heads: every head
    alone, heads of a layer, a head's place over the layers, the last third of the layers, all.
    """
    last = max(1, len(cross) // 3)
    return {
        "heads": cross,
        "layers": cross.mean(1),
        "places": cross.mean(0),
        "last": cross[-last:].mean((0, 1)),
        "all": cross.mean((0, 1)),
    }


def compare(cross: Tensor, saliency: Tensor) -> dict[str, Any]:
    """Correlations of cross attention with a saliency map `[pieces, steps]`, by group of heads.

    Returns lists of numbers as `groups` names them, None where a map is constant; for Pearson's
    and for Spearman's; and how many rows were constant.
    """
    grouped, measures = groups(cross), {"pearson": pearson, "spearman": spearman}
    correlations: dict[str, Any] = {
        name: {n: plain(measure(x, saliency)) for n, x in grouped.items()}
        for name, measure in measures.items()
    }
    constant = {"attention": cross, "saliency": saliency}
    rows = {name: int(standardised(x)[1].sum()) for name, x in constant.items()}
    return {**correlations, "constant_rows": rows}


def plain(x: Tensor) -> Any:
    """Nested lists, with None for NaN."""
    if x.dim():
        return [plain(row) for row in x]
    return None if bool(torch.isnan(x)) else float(x)


def in_span(map: Tensor, spans: Sequence[tuple[int, int]]) -> dict[str, float]:
    """How far a map `[pieces, steps]` points at the true place of each piece's word.

    Args:
        spans: first step and the one after the last of each piece's word.

    Returns:
        mass: mean share of a row, above its minimum, that falls within; hit: share of rows whose
        highest step lies within; chance: mean length of the spans over all steps.
    """
    steps = map.shape[-1]
    within = torch.zeros(map.shape, dtype=torch.bool)
    for n, (a, b) in enumerate(spans):
        within[n, a : max(b, a + 1)] = True
    above = (map - map.amin(-1, keepdim=True)).double()
    total = above.sum(-1)
    share = torch.where(total > 0, (above * within).sum(-1) / total.clamp_min(1e-300), 0.0)
    best = map.argmax(-1)
    return {
        "mass": float(share.mean()),
        "hit": float(within[torch.arange(len(map)), best].double().mean()),
        "chance": float(within.double().mean()) if steps else 0.0,
    }


def place_words(
    pieces: Sequence[str],
    words: Sequence[tuple[str, float, float]],
    seconds: float,
    steps: int,
) -> list[tuple[int, int] | None] | None:
    """First and end step of the word that each piece belongs to; None for pieces of punctuation.
    None in all when the pieces do not spell the words.

    >>> place_words([" A", " cat", "."], [("a", 0.0, 0.1), ("cat", 0.1, 0.5)], 0.02, 25)
    [(0, 5), (5, 25), None]
    """

    def letters(text: str) -> str:
        return "".join(words_of(text)).replace("'", "")

    owner: list[int] = []
    for n, (word, _, _) in enumerate(words):
        owner += [n] * len(letters(word))
    if "".join(map(letters, pieces)) != "".join(letters(w) for w, _, _ in words):
        return None
    spans: list[tuple[int, int] | None] = []
    at = 0
    for piece in pieces:
        size = len(letters(piece))
        if not size:
            spans.append(None)
            continue
        first, last = words[owner[at]], words[owner[at + size - 1]]
        begin = min(round(first[1] / seconds), steps - 1)
        spans.append((begin, min(max(round(last[2] / seconds), begin + 1), steps)))
        at += size
    return spans
