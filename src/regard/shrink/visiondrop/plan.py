"""How many image tokens VisionDrop leaves, and after which layer; and one cut of one image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, Received, attend, measure
from regard.errors import InputError
from regard.parts.decoding.cache import check_whole
from regard.reach import Call

from .card import Size

RATIOS = (1.5, 1.09, 0.81, 0.59)  # tokens of the four segments over their mean, as released
CONTEXT = 8  # one token in so many is contextual; gives the released schedule back


@dataclass(frozen=True)
class Plan:
    """The cuts of an image.

    Attributes:
        encoder: (dominant, contextual) tokens that the vision encoder hands on; None: all.
        cuts: layer -> (dominant, contextual) tokens that enter it.
    """

    encoder: Size | None
    cuts: Mapping[int, Size]

    def __post_init__(self) -> None:
        for size in (*([] if self.encoder is None else [self.encoder]), *self.cuts.values()):
            if not isinstance(size, (tuple, list)) or len(size) != 2:
                raise InputError(f"a cut is a pair (dominant, contextual) of tokens, not {size!r}")
            for tokens in size:
                check_whole("a number of tokens that a cut keeps", tokens, 0)
        for layer in self.cuts:
            check_whole("the layer of a cut", layer, 0)

    def counts(self, image_tokens: int, layers: int) -> list[int]:
        """Image tokens in every layer."""
        now = image_tokens if self.encoder is None else sum(self.encoder)
        found = []
        for n in range(layers):
            now = sum(self.cuts[n]) if n in self.cuts else now
            found.append(now)
        return found

    def mean(self, image_tokens: int, layers: int) -> float:
        """Image tokens, averaged over the layers."""
        return sum(self.counts(image_tokens, layers)) / layers

    def check(self, image_tokens: int, merging: bool) -> None:
        """Refuse what cannot be done with an image of so many tokens.

        Raises:
            InputError: budgets that do not decrease or are empty.
        """
        before, stages = image_tokens, [("the encoder", self.encoder)]
        stages += [(f"layer {n}", self.cuts[n]) for n in sorted(self.cuts)]
        for where, size in stages:
            if size is None:
                continue
            dominant, contextual = size
            if dominant < 1 or contextual < (1 if merging else 0):
                raise InputError(
                    f"the cut at {where} keeps {dominant} dominant and {contextual} contextual "
                    "tokens: both are at least 1 (contextual 0 with merge=False)"
                )
            if dominant + contextual >= before:
                raise InputError(
                    f"the cut at {where} leaves {dominant + contextual} of {before} image tokens: "
                    "budgets must decrease from cut to cut"
                )
            before = dominant + contextual


def schedule(tokens: float, image_tokens: int, layers: int, encoder: bool = True) -> Plan:
    """Cuts at the encoder and after a quarter, a half and three quarters of the layers, so that the
    mean over the layers is `tokens` (a count, or below 1 a share of the image's).

    The segments hold 1.5, 1.09, 0.81 and 0.59 times the mean, as the released schedule for 32 does.
    Without an encoder cut the first segment is whole and the others share what is left; close to
    the whole image they fall by equal steps.

    >>> schedule(32, 576, 32)
    Plan(encoder=(42, 6), cuts={8: (30, 5), 16: (22, 4), 24: (16, 3)})

    Raises:
        InputError: so few tokens that the segments cannot decrease.
    """
    mean = tokens * image_tokens if tokens < 1 else float(tokens)
    ends = [round(layers * k / 4) for k in range(1, 5)]
    widths = [b - a for a, b in zip([0, *ends], ends)]
    if not all(widths):
        raise InputError(f"a schedule of three cuts needs 4 layers, and this model has {layers}")
    encoder = encoder and round(RATIOS[0] * mean) < image_tokens
    first = round(RATIOS[0] * mean) if encoder else image_tokens
    scale = mean
    if not encoder:
        shares = sum(w * r for w, r in zip(widths[1:], RATIOS[1:]))
        scale = (mean * layers - widths[0] * first) / shares
    sizes = [first, *(round(r * scale) for r in RATIOS[1:3])]
    if not encoder and sizes[1] >= first:  # close to the whole image the budgets fall evenly
        step = (first - mean) * layers / sum(w * k for k, w in enumerate(widths))
        sizes = [first, *(round(first - k * step) for k in (1, 2))]
    spent = sum(w * n for w, n in zip(widths, sizes))
    sizes.append(round((mean * layers - spent) / widths[3]))
    if sizes[-1] < 2 or any(a <= b for a, b in pairwise(sizes)):
        least = 1.0 * image_tokens * widths[0] / layers if not encoder else 5
        raise InputError(
            f"{mean:g} of {image_tokens} image tokens on average cannot be reached by budgets that "
            f"decrease from cut to cut ({', '.join(map(str, sizes))}): take a number between "
            f"{math.ceil(least) + 2} and {image_tokens - 1}, or give the cuts by hand"
        )
    split = [(n - math.ceil(n / CONTEXT), math.ceil(n / CONTEXT)) for n in sizes]
    return Plan(split[0] if encoder else None, dict(zip(ends, split[1:])))


def one_cut(tokens: float, image_tokens: int, layers: int, layer: int) -> Plan:
    """A single cut before `layer` (0: at the encoder) with the same mean over the layers.

    >>> one_cut(64, 576, 32, 0), one_cut(192, 576, 32, 2)
    (Plan(encoder=(56, 8), cuts={}), Plan(encoder=None, cuts={2: (145, 21)}))
    """
    mean = tokens * image_tokens if tokens < 1 else float(tokens)
    left = round((mean * layers - layer * image_tokens) / (layers - layer))
    if left < 2:
        raise InputError(
            f"the first {layer} layers alone exceed {mean:g} image tokens on average: raise the "
            f"budget above {layer * image_tokens / layers:.0f}"
        )
    size = (left - math.ceil(left / CONTEXT), math.ceil(left / CONTEXT))
    return Plan(size, {}) if layer == 0 else Plan(None, {layer: size})


def prefill_flops(body: Any, lengths: Sequence[int]) -> int:
    """Exact multiplications and additions of reading one prompt through the layers of a language
    model: two for every weight of a linear layer and token, and four for every query-key pair,
    head and dimension of causal attention.

    Args:
        body: the module with `.layers`; lengths: tokens of the prompt in every layer.
    """
    config, total = body.config, 0
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer, count in zip(body.layers, lengths):
        linear = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        total += 2 * count * sum(m.weight.numel() for m in linear)
        total += 4 * config.num_attention_heads * width * count * (count + 1) // 2
    return total


# -- one cut of one image ------------------------------------------------------------------------
@dataclass(frozen=True)
class Kept:
    """What one cut left of an image.

    Attributes:
        layer: the layer it lies before; 0 for the cut at the encoder.
        dominant: how many tokens, from the first on, were kept as they are.
        groups: of every token left, the patches it stands for; () is the class token.
    """

    layer: int
    dominant: int
    groups: tuple[tuple[int, ...], ...]


def height(kept: Kept, grid: tuple[int, int]) -> float:
    """Mean row of the patches that a cut kept as they are, 0 at the top and 1 at the bottom: the
    diagnostic of causal misalignment. 0.5 is no preference.

    >>> height(Kept(8, 2, ((0,), (4,), (8, 9))), (4, 4))
    0.16666666666666666
    """
    rows = [p // grid[1] for group in kept.groups[: kept.dominant] for p in group]
    return sum(rows) / len(rows) / (grid[0] - 1) if rows else 0.5


def choose(
    score: Tensor, metric: Tensor | None, dominant: int, contextual: int, merge: bool = True
) -> list[list[int]]:
    """Which tokens every new token is made of: `dominant` alone, then `contextual` targets with
    those that fall to them (the target first).

    Args:
        score: `[tokens]`; metric: `[tokens, dim]`, compared by cosine.
        merge: False drops the others; as many tokens stay, all of them alone.

    >>> score = torch.tensor([5.0, 0, 0, 9, 0, 0])
    >>> metric = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0], [0, 2], [3, 1]])
    >>> choose(score, metric, 2, 2)
    [[0], [3], [1, 5], [4, 2]]
    """
    if not merge:
        dominant, contextual = dominant + contextual, 0
    kept = score.argsort(descending=True, stable=True)[:dominant].sort().values.tolist()
    taken = set(kept)
    left = [n for n in range(len(score)) if n not in taken]
    groups = [[n] for n in kept]
    if not contextual or metric is None:
        return groups
    step = max(1, len(left) // contextual)
    targets = left[::step][:contextual]
    others = [n for n in left if n not in set(targets)]
    found = {t: [t] for t in targets}
    if others:
        unit = torch.nn.functional.normalize(metric.double(), dim=-1)
        nearest = (unit[others] @ unit[targets].T).argmax(-1).tolist()
        for other, n in zip(others, nearest):
            found[targets[n]].append(other)
    return groups + list(found.values())


def gather(x: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """New tokens `[groups, dim]` of `x` `[tokens, dim]`: the target plus the mean of the others."""
    first = x[[g[0] for g in groups]]
    more = [x[list(g[1:])].mean(0) if len(g) > 1 else torch.zeros_like(x[0]) for g in groups]
    return first + torch.stack(more)


def random_score(seed: int, layer: int, tokens: int) -> Tensor:
    """Scores by chance, the same for every image of a cut."""
    make = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    return torch.rand(tokens, generator=make)


def visual_score(call: Call, row: int, start: int, span: Size, mask: str) -> Tensor:
    """Mean attention that the image tokens of `span` receive from themselves, `[tokens]`.

    The softmax runs over all that they see, the text before them included. A streaming column fact:
    no matrix is formed.

    Args:
        call: the attention call of the next layer; start: first token of the row that is no
            padding.
        mask: "causal", or "bidirectional" among the image tokens.
    """
    a, b = span
    q, k = call.q[row : row + 1, :, a:b], call.k[row : row + 1, :, start:b]
    seen = Mask.causal() if mask == "causal" else Mask.full()
    return _received(call, q, k, seen)[a - start :] / (b - a)


def text_score(call: Call, row: int, start: int, span: Size) -> Tensor:
    """Attention that the last token of the row pays to the image tokens of `span`, `[tokens]`."""
    q, k = call.q[row : row + 1, :, -1:], call.k[row : row + 1, :, start:]
    return _received(call, q, k, Mask.full())[span[0] - start : span[1] - start]


def _received(call: Call, q: Tensor, k: Tensor, mask: Mask) -> Tensor:
    """Attention received by every key, summed over the queries and averaged over the heads."""
    how: dict[str, Any] = {"mask": mask, "scale": call.scale, "softcap": call.softcap}
    lse = attend(q, k, k, **how).lse
    fact = Received()
    total: Tensor = fact.finish(measure(q, k, lse, [fact], **how)[0])
    return total[0].mean(0)


def tower_score(call: Call, lse: Tensor, class_token: bool) -> Tensor:
    """Scores of the patches in the vision encoder, `[images, patches]`: attention from the class
    token, or the mean that a patch receives from all where there is none.
    """
    if class_token:
        groups = call.q.shape[1] // call.k.shape[1]
        k = call.k.repeat_interleave(groups, 1) if groups > 1 else call.k
        logits = (call.q[:, :, :1] * k[:, :, 1:]).sum(-1).to(lse.dtype) * call.scale
        return (logits - lse[:, :, :1]).exp().sum(1)
    fact = Received()
    sums = measure(call.q, call.k, lse, [fact], mask=call.mask, scale=call.scale)[0]
    total: Tensor = fact.finish(sums)
    return total.mean(1) / call.q.shape[2]
