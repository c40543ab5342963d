"""RefAM: point at what an expression refers to, from a diffusion transformer's joint attention.

Paper: "RefAM: Attention Magnets for Zero-Shot Referral Segmentation", Kukleva, Simsar et al., 2025,
arXiv 2509.22650.

A real image is noised and read once with the expression beside it. How much each image token looks
at each word, among all words, is the word's map. Stop words are magnets: they take surplus
attention, most of it from the background, so more of them are added to the text, and their columns
are dropped after the softmax. Global attention sinks, tokens that all queries look at alike, are
taken out of it.

Deviations. The paper's method section was not at hand, so these are ours (reconstructed): the time
and number of noises, the range of layers, the test for a sink (`kappa`, `gamma`, judged on the mean
over heads), the ramp of place words, the magnets of the default. The pooled vector is always that
of the expression alone, so magnets act through attention only. Clips are read frame by frame.
Maps over padding are never made: its share is reported instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core import State, attend
from regard.core.facts import received
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler, Session, Site
from regard.reach.denoising import Reader, columns, denoising, token_spans
from regard.reach.expressions import STOP_WORDS, Word, head, places, ramp, words
from regard.reach.noised import denoise_once, size_of
from regard.reach.phrases import PARSERS, Parser

MAGNETS = ("with", "to", "pink")
Segmenter = Callable[[Any, tuple[int, int]], Any]


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


@dataclass(frozen=True, eq=False)
class Grounding:
    """Where an expression points.

    Attributes:
        heat: `[height, width]` at the resolution of the image tokens, from 0 to 1.
        point: column and row of the pixel of greatest heat.
        mask: boolean `[image height, image width]`.
        words: every word of the expression and every magnet, in order, with its map
            `[height, width]`; one that stands twice is there twice.
        content: which of them were summed.
        sinks: the tokens that were judged, layer by layer.
        padding: share of the image's attention to text that falls on padding.
        notes: what was done otherwise than asked.
    """

    heat: Tensor
    point: tuple[int, int]
    mask: Tensor
    words: list[tuple[str, Tensor]]
    content: list[str]
    sinks: list[Sink]
    padding: float
    notes: list[str]


@dataclass(eq=False)
class RefAM:
    """Settings of the method; `ground` applies them to an image.

    Args:
        magnets: words appended to the expression; none turns them off.
        stop_words: words that are not summed. An empty set sums every word of the expression.
        noise: time of the noised image; draws: noises to average.
        layers: layer numbers to average; the last 60 % when None.
        gas: sinks are left alone ("off"), taken out of the softmax of their layers ("suppress"),
            or, where a content word is one, drawn to a magnet put in front ("redirect").
        kappa: a sink receives more than this many times the median token's attention.
        gamma: a sink's spread over queries is below this many times its mean.
        noun_phrase: sum only the words of the noun phrase at the head of the expression.
        spatial_bias: weigh the map by the place words of the expression (English).
        normalise: words compete for each "pixel", or each "word" spreads over the pixels (text
            queries on image keys).
        padding: leave padding in the softmax, as an arm to compare with.
        segmenter: "threshold", "sam", "sam2", or a function (image, point) -> boolean mask.
        threshold: share of the greatest heat that is still inside.
        parser: who finds the noun phrase: "rules", "spacy", "constituency" or a function.
        seed: of the noise.

    >>> from PIL import Image
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> scene = Image.linear_gradient("L").resize((32, 32))
    >>> found = RefAM(parser="rules").ground(tiny_pipeline("sd3"), scene, "the red circle")
    >>> found.heat.shape, found.content, found.mask.shape
    (torch.Size([8, 8]), ['red', 'circle'], torch.Size([32, 32]))

    Raises:
        InputError: settings out of range, an expression without content words.
        ReachError: a pipeline without joint attention.
    """

    magnets: Sequence[str] = MAGNETS
    stop_words: frozenset[str] = STOP_WORDS
    noise: float = 0.5
    draws: int = 1
    layers: Sequence[int] | None = None
    gas: str = "suppress"
    kappa: float = 10.0
    gamma: float = 1.0
    noun_phrase: bool = True
    spatial_bias: bool = True
    normalise: str = "pixel"
    padding: bool = False
    segmenter: str | Segmenter = "threshold"
    threshold: float = 0.5
    parser: str | Parser = "spacy"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.magnets, str):
            raise InputError(f"magnets is a list: give [{self.magnets!r}]")
        if not 0 < self.noise < 1 or self.draws < 1:
            raise InputError("noise is a time between 0 and 1, and draws at least 1")
        if self.gas not in ("off", "suppress", "redirect"):
            raise InputError(f"gas is 'off', 'suppress' or 'redirect', not {self.gas!r}")
        if self.normalise not in ("pixel", "word"):
            raise InputError(f"normalise is 'pixel' or 'word', not {self.normalise!r}")
        if not 0 < self.threshold <= 1 or self.kappa <= 0 or self.gamma <= 0:
            raise InputError("threshold lies between 0 and 1; kappa and gamma are positive")
        if isinstance(self.parser, str) and self.parser not in PARSERS:
            raise InputError(f"there is no parser {self.parser!r}: choose one of {PARSERS}")
        if isinstance(self.segmenter, str) and self.segmenter not in ("threshold", *_SAM):
            raise InputError(
                f"segmenter is 'threshold', 'sam', 'sam2' or a function, not {self.segmenter!r}"
            )

    def chosen(self, text: str) -> list[Word]:
        """The words of an expression whose maps are summed.

        Raises:
            InputError: there are none.
        """
        own = words(text, self.stop_words)
        found = [w for w in own if w.content]
        if not found:
            raise InputError(f"no content words in the expression {text!r}: name what is meant")
        return head(text, own, self.parser) if self.noun_phrase else found

    def ground(self, pipe: Any, image: Any, text: str) -> Grounding:
        """Point at what the expression refers to in a PIL image.

        Raises:
            InputError: no content words, an expression that the text encoder cuts off, a map
                without differences.
            ReachError: a pipeline without joint attention (Stable Diffusion 3, Flux).
        """
        chosen = self.chosen(text)
        size_of(pipe, image)
        seen = self._look(pipe, image, text, 0)
        notes: list[str] = []
        if self.gas == "redirect" and any(s.sink and s.content for s in seen.sinks):
            again = self._look(pipe, image, text, 1)
            if any(s.sink and s.content for s in again.sinks):
                notes.append("a content word stayed a sink beside the magnet put in front of it")
            seen = again
        own = words(text)
        maps = seen.maps()
        spans = [(w.start, w.end) for w in own]
        heat = sum(maps[spans.index((w.start, w.end))] for w in chosen)
        assert isinstance(heat, Tensor)
        if not bool(torch.isfinite(heat).all()):
            raise InputError("the attention scores are not finite: the weights hold NaN or inf")
        low, high = heat.min(), heat.max()
        if float(high - low) <= 1e-5 * float(high.abs()):
            raise InputError(
                "the map has no differences: every text token was summed, so each pixel gives 1; "
                "keep stop words, magnets or end marks out of the sum"
            )
        heat = (heat - low) / (high - low)
        if self.spatial_bias:
            for name in places(text):
                heat = heat * ramp(name, *heat.shape)
        fine = _upsample(heat, (image.height, image.width))
        at = int(fine.argmax())  # the first of equals
        point = (at % image.width, at // image.width)
        named = [w.text for w in own] + list(self.magnets)
        return Grounding(
            heat,
            point,
            self._mask(image, fine, point),
            list(zip(named, maps)),
            [w.text for w in chosen],
            seen.sinks,
            seen.padding,
            notes,
        )

    def _look(self, pipe: Any, image: Any, text: str, front: int) -> _Seen:
        """One forward; with `front`, a magnet stands before the expression too."""
        lead = ((list(self.magnets) or ["with"])[0] + " ") if front else ""
        tail = "".join(" " + m for m in self.magnets)
        seen = _Seen(self, text, len(lead), lead + text + tail)
        with Session(pipe, [seen]):
            denoise_once(
                pipe,
                image,
                seen.prompt,
                pooled_text=text,
                noise=self.noise,
                draws=self.draws,
                seed=self.seed,
            )
        return seen

    def _mask(self, image: Any, fine: Tensor, point: tuple[int, int]) -> Tensor:
        if self.segmenter == "threshold":
            return around(fine, point, self.threshold)
        segmenter = sam(self.segmenter) if isinstance(self.segmenter, str) else self.segmenter
        mask = torch.as_tensor(segmenter(image, point)).bool()
        if mask.shape != fine.shape:
            raise InputError(
                f"the segmenter gave a mask of {tuple(mask.shape)} for an image of "
                f"{tuple(fine.shape)} (height, width)"
            )
        return mask


@dataclass(eq=False)
class _Seen(Handler):
    """Running sums of the word maps of one forward, and what each token receives."""

    method: RefAM
    text: str
    lead: int
    prompt: str
    sinks: list[Sink] = field(default_factory=list, init=False)
    padding: float = field(default=0.0, init=False)
    _sum: Tensor | None = field(default=None, init=False)
    _count: int = field(default=0, init=False)
    _grid: tuple[int, ...] = field(default=(0, 0), init=False)
    _layout: tuple[Tensor, Tensor, list[tuple[str, bool]]] | None = field(default=None, init=False)

    def sites(self, sites: list[Site]) -> list[Site]:
        joint = [s for s in sites if s.kind == "joint"]
        if not joint:
            raise ReachError("RefAM needs joint attention: use a Stable Diffusion 3 or Flux model")
        if self.method.layers is None:
            return joint[int(0.4 * len(joint)) :]
        wrong = sorted(set(self.method.layers) - set(range(len(joint))))
        if wrong or not self.method.layers:
            raise InputError(f"layers are numbers from 0 to {len(joint) - 1}, counted as they run")
        return [s for n, s in enumerate(joint) if n in self.method.layers]

    def after(self, call: Call, state: State) -> None:
        place = denoising(call)
        if place.grid is None or place.text is None:
            raise ReachError("the image tokens of this model form no grid")
        present, weights, named = self._columns(call)
        first, many = place.text.start, place.text.stop - place.text.start
        keys = torch.arange(many) if self.method.padding else present
        kept = keys
        self._pad(call, place.text, present)
        if self.method.gas != "off":
            sunk = self._judge(call, state, present, named)
            kept = torch.tensor([int(c) for c in keys if int(c) not in sunk])
            if not len(kept):
                kept = keys
        at = (kept + first).to(call.k.device)
        own = torch.tensor([int(c) in kept.tolist() for c in present])
        wide = weights.to(call.k.device)
        if self.method.normalise == "pixel":
            # the softmax over one group of keys is exp(score - lse of the group)
            group = attend(call.q, call.k[:, :, at], call.v[:, :, at], scale=call.scale)
            share = columns(call, group, present)
        else:
            share = _spread(call, present + first, place.image)
        share = share * own.to(share)  # a sink was taken out: it has no share
        maps = (share.float().mean((0, 1)) @ wide).T.unflatten(1, place.grid)
        self._grid = place.grid
        self._sum = maps if self._sum is None else self._sum + maps
        self._count += 1

    def maps(self) -> list[Tensor]:
        """One map a word of the expression and a magnet, `[height, width]`."""
        assert self._sum is not None
        return list((self._sum / self._count).cpu())

    def _columns(self, call: Call) -> tuple[Tensor, Tensor, list[tuple[str, bool]]]:
        """Key columns that are no padding, which word each is of, and that word."""
        if self._layout is not None:
            return self._layout
        prompts = denoising(call).prompts
        if prompts is None:
            raise InputError("the prompt is not known: pass the whole pipeline")
        shown = self.prompt
        text_end = self.lead + len(self.text)
        own = [(w.start + self.lead, w.end + self.lead) for w in words(self.text)]
        at = text_end
        for magnet in self.method.magnets:
            own.append((at + 1, at + 1 + len(magnet)))
            at += 1 + len(magnet)
        content = {(w.start + self.lead, w.end + self.lead) for w in self.method.chosen(self.text)}
        present: list[int] = []
        rows: list[list[float]] = []
        named: list[tuple[str, bool]] = []
        for start, end in own:
            prompts.columns(0, start, end)  # says so where the encoder cuts a word off
        for reader in _apart(prompts.readers):
            spans = token_spans(reader.tokenizer, shown)[: reader.width]
            for n, (a, b) in enumerate(spans):
                hit = [s for s in own if a < s[1] and b > s[0]]
                present.append(reader.first + n)
                rows.append([float(s in hit) for s in own])
                special = "[start]" if n == 0 and len(spans) > 1 else "[end]"
                name = shown[hit[0][0] : hit[0][1]] if hit else shown[a:b].strip() or special
                named.append((name, any(s in content for s in hit)))
        self._layout = torch.tensor(present), torch.tensor(rows), named
        return self._layout

    def _pad(self, call: Call, text: slice, present: Tensor) -> None:
        """Share of the attention to text that padding has."""
        every = attend(call.q, call.k[:, :, text], call.v[:, :, text], scale=call.scale)
        own = columns(call, every, present).sum(-1).mean()
        seen = self._count
        self.padding = (self.padding * seen + max(0.0, 1 - float(own))) / (seen + 1)

    def _judge(
        self, call: Call, state: State, present: Tensor, named: list[tuple[str, bool]]
    ) -> set[int]:
        """Columns of the global attention sinks of this layer."""
        place = denoising(call)
        assert place.text is not None
        queries = call.q.shape[2]
        total = received(call.q, call.k, state.lse, scale=call.scale)
        mean = total.float().mean((0, 1)) / queries
        median = mean.median()
        k = call.k[:, :, (present + place.text.start).to(call.k.device)].to(state.lse.dtype)
        scores = call.scale * call.q.to(k.dtype) @ k.transpose(-1, -2)
        p = (scores - state.lse[..., None]).exp().mean((0, 1))  # [queries, present]
        spread = p.std(0, unbiased=False) / p.mean(0).clamp_min(1e-12)
        sunk: set[int] = set()
        for n, column in enumerate(present.tolist()):
            got = float(mean[place.text.start + column])
            ratio = got / max(float(median), 1e-12)
            sink = ratio > self.method.kappa and float(spread[n]) < self.method.gamma
            if sink:
                sunk.add(column)
            name, content = named[n]
            self.sinks.append(
                Sink(call.site.name, name, column, content, got, ratio, float(spread[n]), sink)
            )
        return sunk


def _apart(readers: Sequence[Reader]) -> list[Reader]:
    """One reader of those that share their columns."""
    return list({r.first: r for r in reversed(readers)}.values())[::-1]


def _spread(call: Call, keys: Tensor, image: slice) -> Tensor:
    """Each word's own distribution over the image: text queries on image keys, `[batch, heads,
    image tokens, words]`.

    Queries and keys of the text stand at the same places, counted from the end or the start alike.
    """
    shift = call.q.shape[2] - call.k.shape[2]
    own = call.q[:, :, (keys + shift).to(call.q.device)]
    k, v = call.k[:, :, image], call.v[:, :, image]
    lse = attend(own, k, v, scale=call.scale).lse
    scores = call.scale * own.to(lse.dtype) @ k.to(lse.dtype).transpose(-1, -2)
    return (scores - lse[..., None]).exp().transpose(-1, -2)


def _upsample(heat: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(heat[None, None], size, mode="bicubic", align_corners=False)[0, 0]


def around(heat: Tensor, point: tuple[int, int], share: float = 0.5) -> Tensor:
    """The connected part of `heat >= share * max` that holds the point (column, row).

    >>> row = torch.tensor([[0.9, 0.1, 1.0, 0.8]])
    >>> around(row, (2, 0)).tolist()
    [[False, False, True, True]]
    """
    inside = heat >= share * heat.max()
    grown = torch.zeros_like(inside)
    grown[point[1], point[0]] = True
    while True:
        # a plus-shaped growth, held inside, until nothing changes
        f = grown.float()[None, None]
        wide = F.max_pool2d(f, (3, 1), 1, (1, 0)) + F.max_pool2d(f, (1, 3), 1, (0, 1))
        more = (wide[0, 0] > 0) & inside
        if torch.equal(more, grown):
            return more
        grown = more


_SAM = {"sam": "facebook/sam-vit-huge", "sam2": "facebook/sam2-hiera-large"}


def sam(name: str, checkpoint: str | None = None) -> Segmenter:
    """SAM or SAM 2 of transformers as a segmenter: one positive point, the mask of best score.

    Raises:
        InputError: the checkpoint is not at hand.
    """
    import transformers

    kind = {"sam": "Sam", "sam2": "Sam2"}[name]
    source = checkpoint or _SAM[name]
    try:
        model = getattr(transformers, f"{kind}Model").from_pretrained(source).eval()
        processor = getattr(transformers, f"{kind}Processor").from_pretrained(source)
    except (OSError, ImportError) as problem:
        raise InputError(
            f"the segmenter {source} cannot be loaded ({str(problem).splitlines()[0]}): take "
            'segmenter="threshold", or a function of your own'
        ) from None

    def segment(image: Any, point: tuple[int, int]) -> Tensor:
        points = [[[[*point]]]] if name == "sam2" else [[[*point]]]
        labels = {"input_labels": [[[1]]]} if name == "sam2" else {}
        given = processor(image.convert("RGB"), input_points=points, return_tensors="pt", **labels)
        with torch.no_grad():
            out = model(**given)
        sizes = [given["original_sizes"]]
        if name == "sam":
            sizes.append(given["reshaped_input_sizes"])
        masks = processor.post_process_masks(out.pred_masks.cpu(), *sizes)[0]
        best = int(out.iou_scores.flatten().argmax())
        return masks.flatten(0, -3)[best].bool()

    return segment


__all__ = ["MAGNETS", "Grounding", "RefAM", "Sink", "around", "sam"]
