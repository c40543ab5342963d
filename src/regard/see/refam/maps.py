"""The map of each word, and what each text token receives, in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.core import State, attend
from regard.core.facts import received
from regard.errors import InputError, ReachError
from regard.parts.text.expressions import Word, words
from regard.reach import Call, Handler, Site
from regard.reach.denoising import Reader, columns, denoising, token_spans

from .card import Settings


@dataclass(frozen=True)
class Sink:
    """What one text token receives in one layer.

    Attributes:
        word: its word; "[start]" and "[end]" for the marks of a text encoder.
        mean: received attention over all queries, text and image; ratio: over the median token's.
        spread: standard deviation over mean, over queries.
        sink: whether it was found to be a global attention sink.
    """

    layer: str
    word: str
    column: int
    content: bool
    mean: float
    ratio: float
    spread: float
    sink: bool


@dataclass(frozen=True)
class Layout:
    """Where the prompt's words are: key columns that are no padding, `[columns]`; which word each
    belongs to, `[columns, words]`; its word, and whether that is summed.
    """

    columns: Tensor
    words: Tensor
    named: list[tuple[str, bool]]


@dataclass(eq=False)
class WordShares(Handler):
    """Attention of the image on each word, averaged over layers, and what each token receives.

    Args:
        settings: of the method.
        text: the expression; `summed` are the words of it whose maps are summed.
        front: whether a magnet is put before the expression as well.
    """

    settings: Settings
    text: str
    summed: Sequence[Word]
    front: bool = False
    sinks: list[Sink] = field(default_factory=list, init=False)
    padding: float = field(default=0.0, init=False)
    _total: Tensor | None = field(default=None, init=False)
    _count: int = field(default=0, init=False)
    _known: Layout | None = field(default=None, init=False)

    @property
    def prompt(self) -> str:
        """The expression between its magnets."""
        return self._lead + self.text + "".join(" " + m for m in self.settings.magnets)

    @property
    def _lead(self) -> str:
        return ([*self.settings.magnets, "with"][0] + " ") if self.front else ""

    def sites(self, sites: list[Site]) -> list[Site]:
        joint = [s for s in sites if s.kind == "joint"]
        if not joint:
            raise ReachError("RefAM needs joint attention: use a Stable Diffusion 3 or Flux model")
        layers = self.settings.layers
        if layers is None:
            return joint[int(0.4 * len(joint)) :]
        if not layers or set(layers) - set(range(len(joint))):
            raise InputError(f"layers are numbers from 0 to {len(joint) - 1}, counted as they run")
        return [s for n, s in enumerate(joint) if n in layers]

    def after(self, call: Call, state: State) -> None:
        place = denoising(call)
        if place.grid is None or place.text is None:
            raise ReachError("the image tokens of this model form no grid")
        layout = self._layout(call)
        first, many = place.text.start, place.text.stop - place.text.start
        keys = torch.arange(many) if self.settings.padding else layout.columns
        self._measure_padding(call, layout.columns)
        sunk = self._judge(call, state, layout) if self.settings.gas != "off" else set()
        kept = [c for c in keys.tolist() if c not in sunk] or keys.tolist()
        at = torch.tensor(kept, device=call.k.device) + first
        if self.settings.normalise == "pixel":
            # the softmax over one group of keys is exp(score - lse of the group)
            group = attend(call.q, call.k[:, :, at], call.v[:, :, at], scale=call.scale)
            share = columns(call, group, layout.columns)
        else:
            share = _over_image(call, layout.columns + first, place.image)
        # a sink was taken out: it has no share
        share = share * torch.tensor([int(c) in kept for c in layout.columns]).to(share)
        by_word = share.float().mean((0, 1)) @ layout.words.to(call.k.device)
        maps = by_word.T.unflatten(1, place.grid)
        self._total = maps if self._total is None else self._total + maps
        self._count += 1

    def maps(self) -> list[Tensor]:
        """One map a word of the expression and a magnet, `[height, width]`."""
        assert self._total is not None
        return list((self._total / self._count).cpu())

    def _layout(self, call: Call) -> Layout:
        if self._known is not None:
            return self._known
        prompts = denoising(call).prompts
        if prompts is None:
            raise InputError("the prompt is not known: pass the whole pipeline")
        lead = len(self._lead)
        spans = [(w.start + lead, w.end + lead) for w in words(self.text)]
        end = lead + len(self.text)
        for magnet in self.settings.magnets:
            spans.append((end + 1, end + 1 + len(magnet)))
            end += 1 + len(magnet)
        summed = {(w.start + lead, w.end + lead) for w in self.summed}
        for span in spans:
            prompts.columns(0, *span)  # refuses a word that the encoder cuts off
        present: list[int] = []
        rows: list[list[float]] = []
        named: list[tuple[str, bool]] = []
        for reader in _apart(prompts.readers):
            pieces = token_spans(reader.tokenizer, self.prompt)[: reader.width]
            for n, (a, b) in enumerate(pieces):
                hit = [s for s in spans if a < s[1] and b > s[0]]
                present.append(reader.first + n)
                rows.append([float(s in hit) for s in spans])
                special = "[start]" if n == 0 and len(pieces) > 1 else "[end]"
                piece = slice(*hit[0]) if hit else slice(a, b)
                named.append((self.prompt[piece].strip() or special, any(s in summed for s in hit)))
        self._known = Layout(torch.tensor(present), torch.tensor(rows), named)
        return self._known

    def _measure_padding(self, call: Call, present: Tensor) -> None:
        """Add this layer to the mean share of the attention to text that falls on padding."""
        text = denoising(call).text
        assert text is not None
        every = attend(call.q, call.k[:, :, text], call.v[:, :, text], scale=call.scale)
        share = max(0.0, 1 - float(columns(call, every, present).sum(-1).mean()))
        self.padding = (self.padding * self._count + share) / (self._count + 1)

    def _judge(self, call: Call, state: State, layout: Layout) -> set[int]:
        """Columns of the global attention sinks of this layer."""
        text = denoising(call).text
        assert text is not None
        total = received(call.q, call.k, state.lse, scale=call.scale)
        mean = total.float().mean((0, 1)) / call.q.shape[2]
        median = float(mean.median())
        k = call.k[:, :, (layout.columns + text.start).to(call.k.device)].to(state.lse.dtype)
        scores = call.scale * call.q.to(k.dtype) @ k.transpose(-1, -2)
        p = (scores - state.lse[..., None]).exp().mean((0, 1))  # [queries, columns]
        spread = (p.std(0, unbiased=False) / p.mean(0).clamp_min(1e-12)).tolist()
        rule, sunk = self.settings, set()
        for column, (word, content), varies in zip(layout.columns.tolist(), layout.named, spread):
            got = float(mean[text.start + column])
            ratio = got / max(median, 1e-12)
            sink = ratio > rule.kappa and varies < rule.gamma
            if sink:
                sunk.add(column)
            self.sinks.append(Sink(call.site.name, word, column, content, got, ratio, varies, sink))
        return sunk


def _over_image(call: Call, keys: Tensor, image: slice) -> Tensor:
    """Each word's own distribution over the image: text queries on image keys, `[batch, heads,
    image tokens, words]`.

    Queries and keys of the text stand at the same places, counted from the end or the start alike.
    """
    shift = call.q.shape[2] - call.k.shape[2]
    q = call.q[:, :, (keys + shift).to(call.q.device)]
    k, v = call.k[:, :, image], call.v[:, :, image]
    lse = attend(q, k, v, scale=call.scale).lse
    scores = call.scale * q.to(lse.dtype) @ k.to(lse.dtype).transpose(-1, -2)
    return (scores - lse[..., None]).exp().transpose(-1, -2)


def _apart(readers: Sequence[Reader]) -> list[Reader]:
    """One reader of those that share their columns."""
    return list({r.first: r for r in reversed(readers)}.values())[::-1]
